"""The zoo's record as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

Results = Sequence[dict[str, Any]]


def is_whole(result: dict[str, Any]) -> bool:
    """Whether all of a model is in the graph, and exact wherever its own forward runs."""
    sizes = result.get("sizes", {}).values()
    return (
        result["status"] == "exact"
        and not result["opaque"]
        and all(share == 1.0 for share in result["coverage"].values())
        and not any(answer.startswith("guarded") for answer in sizes)
    )


def summary(results: Results) -> str:
    """Counts for each library, as a Markdown table."""
    head = (
        "| library | captured | exact | fully in graph | batch size free | other sizes free | partly opaque | failed | "
        "within 3 forwards + 1 s | within 1.5 of eager's peak memory |"
    )
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for group in _groups(results):
        ran = [result for result in results if _group(result) == group and result["status"] != "not run"]
        if not ran:
            continue
        done = [result for result in ran if result["status"] in ("exact", "differs")]
        timed = [r for r in done if "capture_seconds" in r]
        quick = [r for r in timed if r["capture_seconds"] <= 3 * r["eager_seconds"] + 1]
        weighed = [r for r in done if r.get("eager_peak_bytes")]
        small = [r for r in weighed if r["capture_peak_bytes"] <= 1.5 * r["eager_peak_bytes"]]
        cells = [
            len(ran),
            sum(result["status"] == "exact" for result in ran),
            sum(result["status"] == "exact" and not result["opaque"] for result in ran),
            _free(done, "batch"),
            _free(done, "size"),
            sum(bool(result["opaque"]) for result in done),
            sum(result["status"] not in ("exact",) for result in ran),
            f"{len(quick)} of {len(timed)}",
            f"{len(small)} of {len(weighed)}",
        ]
        lines.append(f"| {group} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def table(results: Results) -> str:
    """The whole record, as a Markdown document."""
    commits = Counter(result.get("commit", "unknown") for result in results)
    parts = [
        "# The zoo",
        "",
        "Written by `make zoo`; the figures behind it are in zoo.json. Seconds are of one processor. "
        "Inputs that hold the sizes of images are static: these are guarded, and the batch with them.",
    ]
    if len(commits) > 1:
        told = ", ".join(f"{count} of {commit}" for commit, count in commits.most_common())
        parts += ["", f"Not one run: of each model this is the newest. Models by commit: {told}."]
    parts += ["", summary(results), ""]
    parts += ["## What is not wholly in the graph, or not exact", ""]
    parts += [f"- {r['library']} `{r['name']}`: {_what(r)}" for r in results if r["status"] != "not run" and _what(r)]
    parts += ["", "## All models", "", _head()]
    parts += [_row(result) for result in results if "coverage" in result]
    left_out = Counter(result["library"] for result in results if result["status"] == "not run")
    parts += ["", "## Not run", ""]
    parts += [
        f"{left_out[library]} of {library}: no small config was found with which eager runs: "
        + ", ".join(f"`{r['name']}`" for r in results if r["library"] == library and r["status"] == "not run")
        for library in left_out
    ]
    return "\n".join(parts) + "\n"


def _groups(results: Results) -> list[str]:
    return list(dict.fromkeys(map(_group, results)))


def _group(result: dict[str, Any]) -> str:
    return f"{result['library']}, {result['kind']}" if result["library"] != "torch" else "torch"


def _free(results: Results, name: str) -> str:
    answers = [r["sizes"][name] for r in results if name in r["sizes"] and not r["sizes"][name].startswith("not taken")]
    return f"{sum(answer == 'exact' for answer in answers)} of {len(answers)}"


def _what(result: dict[str, Any]) -> str:
    parts = [result["error"]] if result.get("error") else []
    if result["status"] == "timeout":
        parts.append("took too long")
    for part in result.get("opaque", [])[:3]:
        parts.append(f"`{part['path'] or 'the module itself'}` is opaque: {part['reason']} ({part['location']})")
    if len(result.get("opaque", [])) > 3:
        parts.append(f"{len(result['opaque']) - 3} more opaque parts")
    parts += [f"{n}: {answer}" for n, answer in result.get("sizes", {}).items() if answer.startswith("guarded")]
    return "; ".join(parts)


def _head() -> str:
    return (
        "| library | model | status | calls | flops | parameters | opaque | guards | nodes | capture | eager |\n"
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )


def _row(result: dict[str, Any]) -> str:
    shares = [f"{result['coverage'][name]:.3f}" for name in ("call_sites", "flops", "parameters")]
    cells = [result["library"], result["name"], result["status"], *shares]
    cells += [str(len(result["opaque"])), str(result["guards"]), str(result["nodes"])]
    cells += [
        f"{result[f'{what}_seconds']:.2f} s" if f"{what}_seconds" in result else "-" for what in ("capture", "eager")
    ]
    return "| " + " | ".join(cells) + " |"
