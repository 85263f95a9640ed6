"""All rules, by their ids."""

from passes.audit.rule import Rule
from passes.audit.rules.activations import dead_activation, saturated_activation
from passes.audit.rules.batch_norms import batch_statistics, bias_before_norm
from passes.audit.rules.branches import data_dependent, shape_decision
from passes.audit.rules.epsilon_underflows import epsilon_underflows
from passes.audit.rules.evaluation import left_in_training, random_in_eval
from passes.audit.rules.fixed_device import fixed_device
from passes.audit.rules.forward_fails import forward_fails
from passes.audit.rules.gradients import dead_gradient, gradient_range, no_gradient, unused_parameter
from passes.audit.rules.host_round_trip import host_round_trip
from passes.audit.rules.idle_mask import idle_mask
from passes.audit.rules.initial_weights import dead_weights, init_gain
from passes.audit.rules.lost_tie import lost_tie
from passes.audit.rules.low_precision import low_precision
from passes.audit.rules.made_in_forward import made_in_forward
from passes.audit.rules.meetings import device_mismatch, factory_without_device
from passes.audit.rules.missing_super_init import missing_super_init
from passes.audit.rules.mixed_dtypes import mixed_dtypes
from passes.audit.rules.no_onnx import no_onnx
from passes.audit.rules.not_finite import not_finite
from passes.audit.rules.opaque_part import opaque_part
from passes.audit.rules.plain_containers import unregistered_module, unregistered_parameter
from passes.audit.rules.sample_loop import sample_loop
from passes.audit.rules.shared_inplace import shared_inplace
from passes.audit.rules.signal_lost import signal_lost
from passes.audit.rules.unguarded import unguarded_division, unguarded_log, unguarded_sqrt
from passes.audit.rules.unregistered_tensor import unregistered_tensor
from passes.audit.rules.unsaved_buffer import unsaved_buffer
from passes.audit.rules.waste import repeated_computation, unused_result
from passes.audit.rules.whole_module_saved import whole_module_saved

RULES: tuple[Rule, ...] = (
    unregistered_tensor,
    unregistered_module,
    unregistered_parameter,
    made_in_forward,
    missing_super_init,
    lost_tie,
    shared_inplace,
    fixed_device,
    factory_without_device,
    device_mismatch,
    host_round_trip,
    mixed_dtypes,
    epsilon_underflows,
    unguarded_sqrt,
    unguarded_log,
    unguarded_division,
    low_precision,
    not_finite,
    unused_parameter,
    dead_weights,
    init_gain,
    left_in_training,
    random_in_eval,
    no_gradient,
    dead_gradient,
    gradient_range,
    dead_activation,
    forward_fails,
    saturated_activation,
    signal_lost,
    data_dependent,
    sample_loop,
    no_onnx,
    whole_module_saved,
    unsaved_buffer,
    batch_statistics,
    opaque_part,
    shape_decision,
    bias_before_norm,
    unused_result,
    repeated_computation,
    idle_mask,
)
