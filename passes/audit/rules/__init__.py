"""All rules, by their ids."""

from passes.audit.rule import Rule
from passes.audit.rules.batch_statistics import BatchStatistics
from passes.audit.rules.bias_before_norm import BiasBeforeNorm
from passes.audit.rules.data_dependent import DataDependent
from passes.audit.rules.dead_activation import DeadActivation
from passes.audit.rules.dead_gradient import DeadGradient
from passes.audit.rules.dead_weights import DeadWeights
from passes.audit.rules.device_mismatch import DeviceMismatch
from passes.audit.rules.epsilon_underflows import EpsilonUnderflows
from passes.audit.rules.factory_without_device import FactoryWithoutDevice
from passes.audit.rules.fixed_device import FixedDevice
from passes.audit.rules.forward_fails import ForwardFails
from passes.audit.rules.gradient_range import GradientRange
from passes.audit.rules.host_round_trip import HostRoundTrip
from passes.audit.rules.idle_mask import IdleMask
from passes.audit.rules.init_gain import InitGain
from passes.audit.rules.left_in_training import LeftInTraining
from passes.audit.rules.lost_tie import LostTie
from passes.audit.rules.low_precision import LowPrecision
from passes.audit.rules.made_in_forward import MadeInForward
from passes.audit.rules.missing_super_init import MissingSuperInit
from passes.audit.rules.mixed_dtypes import MixedDtypes
from passes.audit.rules.no_gradient import NoGradient
from passes.audit.rules.no_onnx import NoOnnx
from passes.audit.rules.not_finite import NotFinite
from passes.audit.rules.opaque_part import OpaquePart
from passes.audit.rules.random_in_eval import RandomInEval
from passes.audit.rules.repeated_computation import RepeatedComputation
from passes.audit.rules.sample_loop import SampleLoop
from passes.audit.rules.saturated_activation import SaturatedActivation
from passes.audit.rules.shape_decision import ShapeDecision
from passes.audit.rules.shared_inplace import SharedInplace
from passes.audit.rules.signal_lost import SignalLost
from passes.audit.rules.unguarded_division import UnguardedDivision
from passes.audit.rules.unguarded_log import UnguardedLog
from passes.audit.rules.unguarded_sqrt import UnguardedSqrt
from passes.audit.rules.unregistered_module import UnregisteredModule
from passes.audit.rules.unregistered_parameter import UnregisteredParameter
from passes.audit.rules.unregistered_tensor import UnregisteredTensor
from passes.audit.rules.unsaved_buffer import UnsavedBuffer
from passes.audit.rules.unused_parameter import UnusedParameter
from passes.audit.rules.unused_result import UnusedResult
from passes.audit.rules.whole_module_saved import WholeModuleSaved

RULES: tuple[type[Rule], ...] = (
    UnregisteredTensor,
    UnregisteredModule,
    UnregisteredParameter,
    MadeInForward,
    MissingSuperInit,
    LostTie,
    SharedInplace,
    FixedDevice,
    FactoryWithoutDevice,
    DeviceMismatch,
    HostRoundTrip,
    MixedDtypes,
    EpsilonUnderflows,
    UnguardedSqrt,
    UnguardedLog,
    UnguardedDivision,
    LowPrecision,
    NotFinite,
    UnusedParameter,
    DeadWeights,
    InitGain,
    LeftInTraining,
    RandomInEval,
    NoGradient,
    DeadGradient,
    GradientRange,
    DeadActivation,
    ForwardFails,
    SaturatedActivation,
    SignalLost,
    DataDependent,
    SampleLoop,
    NoOnnx,
    WholeModuleSaved,
    UnsavedBuffer,
    BatchStatistics,
    OpaquePart,
    ShapeDecision,
    BiasBeforeNorm,
    UnusedResult,
    RepeatedComputation,
    IdleMask,
)
