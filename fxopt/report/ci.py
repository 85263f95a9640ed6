"""What the report of `fxopt ci` says: verdicts first."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from fxopt.report import words
from fxopt.report.section import Section, Table

_MOST_NAMED = 3


def ci_sections(record: Mapping[str, Any]) -> list[Section]:
    """All sections of the report on a gate."""
    base, head = record["base"], record["head"]
    rows = tuple(verdict_row(target) for target in record["targets"])
    headings = ("target", "verdict", "base", "head", "latency [95 % interval]", "noise floor", "allowed")
    facts = (
        ("head", f"the working tree: {head['commit'][:7]}{_uncommitted(head)}"),
        ("base", _base(base, head)),
        ("machine", words.machine(record["machine"])),
    )
    found = [Section("fxopt ci", facts, Table(headings, rows, (2, 3, 5, 6)))]
    for target in record["targets"]:
        found += _target(target)
    return found


def verdict_row(target: Mapping[str, Any]) -> tuple[str, ...]:
    """One target in the cells of the first table."""
    latency = target["latency"]
    if latency is None:
        return target["name"], target["verdict"], "-", "-", "not measured", "", ""
    interval = f"{words.change(latency['ratio'])} [{words.change(latency['low'])}, {words.change(latency['high'])}]"
    verdict = target["verdict"]
    if verdict != latency["verdict"]:
        verdict = f"{verdict} (latency {latency['verdict']})"
    times = words.duration(latency["base_ms"]), words.duration(latency["head_ms"])
    limits = words.effect(latency["noise_floor"]), words.effect(target["threshold"])
    return target["name"], verdict, *times, interval, *limits


def failures(target: Mapping[str, Any]) -> list[str]:
    """What is wrong with one target, a sentence each; empty where it is fine."""
    found = []
    latency = target["latency"]
    if latency is not None and latency["verdict"] == "REGRESSION":
        times = f"{words.duration(latency['base_ms'])} -> {words.duration(latency['head_ms'])}"
        interval = f"[{words.change(latency['low'])}, {words.change(latency['high'])}]"
        text = f"latency on {target['device']}: {times}, {words.change(latency['ratio'])} {interval}"
        found.append(f"{text}; allowed are {words.effect(target['threshold'])}{cause(target)}")
    found += [f"{one['name']}: {one['message']}" for one in target["checks"] if one["status"] == "failed"]
    if latency is None and target["verdict"] not in ("OK", "new"):
        found += target["notes"]
    return found


def cause(target: Mapping[str, Any]) -> str:
    """`; caused by the pass 'fuse': ...`, or nothing."""
    found = target["cause"]
    if found is None:
        return ""
    by = "the model itself" if found["pass"] is None else f"the pass '{found['pass']}'"
    return f"; caused by {by}: {found['what']}"


def in_repository(record: Mapping[str, Any], file: str) -> str:
    """The path from the top of the repository of a file that is named as a target would be."""
    return posixpath.normpath(posixpath.join(record["head"]["directory"], file))


def _uncommitted(head: Mapping[str, Any]) -> str:
    if not head["dirty"]:
        return ""
    files = head["uncommitted"]
    more = f" and {len(files) - _MOST_NAMED} more" if len(files) > _MOST_NAMED else ""
    named = ", ".join(files[:_MOST_NAMED])
    return f" with uncommitted changes in {words.number_of(len(files), 'file')}: {named}{more}"


def _base(base: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    commit = base["commit"][:7]
    if base["commit"] != head["commit"]:
        return f"{commit}, where HEAD left '{base['revision']}'"
    same = "" if head["dirty"] else "; both are the same code: name the revision that the change started from by --base"
    return f"{commit} ({base['revision']}){same}"


def _target(target: Mapping[str, Any]) -> Iterator[Section]:
    wrong = failures(target)
    facts = [("wrong", text) if not index else ("", text) for index, text in enumerate(wrong)]
    latency = target["latency"]
    if latency is not None:
        preempted = "" if latency["preempted"] is None else f", {words.effect(latency['preempted'])} preempted"
        took = (
            f"{latency['pairs']} pairs in {latency['processes']} processes and {latency['windows']} windows{preempted}"
        )
        facts.append(("measured", took))
        times = words.duration(1e3 * target["seconds"]), words.duration(1e3 * latency["measuring_seconds"])
        facts.append(("took", f"{times[0]}, {times[1]} of it in the model's timed calls"))
    found = target["cause"]
    for index, rung in enumerate(found["ladder"] if found else []):
        facts.append(("" if index else "ladder", f"{words.change(rung['ratio'])} after {rung['after']}"))
    rows = tuple((one["name"], one["before"], one["after"], _status(one)) for one in target["checks"])
    table = Table(("", "base", "head", "check"), rows, (1, 2)) if rows else None
    notes = () if latency is None and wrong else tuple(target["notes"])
    if facts or table or notes:
        yield Section(target["name"], tuple(facts), table, notes)


def _status(check: Mapping[str, Any]) -> str:
    return f"{check['status']}: {check['message']}" if check["message"] else str(check["status"])
