"""Channel norms as modules: torch.nn's norms with an activation, and in batch norms a residual before it."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Proxy

from .. import functional as F
from ..activations import Activation, activation_name
from .channel_norms_of_torch import batch_norm_of, group_of, instance_norm_of
from .extras import extras, recorded, weight_and_bias

if TYPE_CHECKING:  # the classes that the two mixins below are combined with
    _OfBatchNorm = nn.modules.batchnorm._BatchNorm
    _OfInstanceNorm = nn.modules.instancenorm._InstanceNorm
else:
    _OfBatchNorm = _OfInstanceNorm = object


class _BatchNorm(_OfBatchNorm):
    """The part of the batch norms that is not in torch's classes, their other base."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, residual)) is not None:
            return call
        return batch_norm_of(self, input, residual, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    r"""`torch.nn.BatchNorm1d` with a residual and an activation, as one block: `forward(input, residual=None)`.

    .. math::
        y = \mathrm{act}(\mathrm{BatchNorm}(x) + r)

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's, which may have more.
        activation: act, applied to the sum.

    Shape:
        `(N, C)` or `(N, C, L)`, and a residual of the same shape, to that shape. Parameters and buffers are torch's.

    Kept for backward:
        The input and two numbers per channel; with a residual, also the output for relu and leaky_relu, else the
        residual.

    Example:
        >>> norm = ckpt_kernels.nn.BatchNorm1d(4, activation="relu")
        >>> x, residual = torch.randn(8, 4), torch.randn(8, 4)
        >>> y = norm(x, residual)
        >>> torch.allclose(y, torch.relu(torch.nn.BatchNorm1d(4)(x) + residual), atol=1e-5)
        True

    Errors and source: `functional.batch_norm`; ValueError for an input of other dimensions.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    r"""`torch.nn.BatchNorm2d` with a residual and an activation, as one block: `forward(input, residual=None)`.

    .. math::
        y = \mathrm{act}(\mathrm{BatchNorm}(x) + r)

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's, which may have more.
        activation: act, applied to the sum.

    Shape:
        `(N, C, H, W)`, and a residual of the same shape, to that shape. Parameters and buffers are torch's.

    Kept for backward:
        The input and two numbers per channel; with a residual, also the output for relu and leaky_relu, else the
        residual.

    Example:
        >>> norm = ckpt_kernels.nn.BatchNorm2d(4, activation="relu")
        >>> x, residual = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        >>> y = norm(x, residual)
        >>> torch.allclose(y, torch.relu(torch.nn.BatchNorm2d(4)(x) + residual), atol=1e-5)
        True

    Errors and source: `functional.batch_norm`; ValueError for an input of other dimensions.
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    r"""`torch.nn.BatchNorm3d` with a residual and an activation, as one block: `forward(input, residual=None)`.

    .. math::
        y = \mathrm{act}(\mathrm{BatchNorm}(x) + r)

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's, which may have more.
        activation: act, applied to the sum.

    Shape:
        `(N, C, D, H, W)`, and a residual of the same shape, to that shape. Parameters and buffers are torch's.

    Kept for backward:
        The input and two numbers per channel; with a residual, also the output for relu and leaky_relu, else the
        residual.

    Example:
        >>> norm = ckpt_kernels.nn.BatchNorm3d(4, activation="relu")
        >>> x, residual = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 4, 4, 4, 4)
        >>> y = norm(x, residual)
        >>> torch.allclose(y, torch.relu(torch.nn.BatchNorm3d(4)(x) + residual), atol=1e-5)
        True

    Errors and source: `functional.batch_norm`; ValueError for an input of other dimensions.
    """


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    r"""`torch.nn.SyncBatchNorm` with a residual and an activation: `forward(input, residual=None)`.

    .. math::
        y = \mathrm{act}(\mathrm{BatchNorm}(x) + r)

    In training, the statistics are taken over the batches of all processes, on the CPU or on GPUs, with any
    torch.distributed backend. Without a process group, or in eval mode, the module is a batch norm.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: as torch's, which may
            have more.
        activation: act, applied to the sum.

    Shape:
        `(N, C, *)`, and a residual of the same shape, to that shape. Parameters and buffers are torch's.

    Kept for backward:
        The input and two numbers per channel; with a residual, also the output for relu and leaky_relu, else the
        residual.

    Example:
        >>> norm = ckpt_kernels.nn.SyncBatchNorm(4, activation="relu")
        >>> norm(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])

    Errors and source: `functional.batch_norm`; ValueError for an input of fewer than two dimensions.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input, residual)) is not None:
            return call
        return batch_norm_of(self, input, residual, self.activation, group_of(self) if self.training else None)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dimensions; expected at least 2")


class GroupNorm(nn.GroupNorm):
    r"""`torch.nn.GroupNorm` with an activation, as one block.

    .. math::
        y = \mathrm{act}(\mathrm{GroupNorm}(x))

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as torch's, which may have more.
        activation: act, applied to the normalised value.

    Shape:
        `(N, C, *)` to the same. Parameters, as torch's: `weight` and `bias`, `(C)`.

    Kept for backward:
        The input and two numbers per group of each sample.

    Example:
        >>> norm = ckpt_kernels.nn.GroupNorm(2, 4, activation="silu")
        >>> norm(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])

    Errors and source: `functional.group_norm`.
    """

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        weight, bias = weight_and_bias(self)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class _InstanceNorm(_OfInstanceNorm):
    """The part of the instance norms that is not in torch's classes, their other base."""

    def __init__(self, *args: Any, activation: Activation = "identity", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation = activation_name(activation)

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy) and (call := recorded(self, input)) is not None:
            return call
        return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return instance_norm_of(self, input, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + extras(activation=(self.activation, "identity"))


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    r"""`torch.nn.InstanceNorm1d` with an activation, as one block.

    .. math::
        y = \mathrm{act}(\mathrm{InstanceNorm}(x))

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's, which may have more.
        activation: act, applied to the normalised value.

    Shape:
        `(N, C, L)`, or `(C, L)` of one sample; to the same, contiguous. Parameters and buffers are torch's.

    Kept for backward:
        The input (of one that is channels last a contiguous copy) and two numbers for each channel of each sample.

    Example:
        >>> norm = ckpt_kernels.nn.InstanceNorm1d(4, activation="relu")
        >>> x = torch.randn(2, 4, 8)
        >>> torch.allclose(norm(x), torch.relu(torch.nn.InstanceNorm1d(4)(x)), atol=1e-5)
        True

    Errors and source: `functional.instance_norm`.
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    r"""`torch.nn.InstanceNorm2d` with an activation, as one block.

    .. math::
        y = \mathrm{act}(\mathrm{InstanceNorm}(x))

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's, which may have more.
        activation: act, applied to the normalised value.

    Shape:
        `(N, C, H, W)`, or `(C, H, W)` of one sample; to the same, contiguous. Parameters and buffers are torch's.

    Kept for backward:
        The input (of one that is channels last a contiguous copy) and two numbers for each channel of each sample.

    Example:
        >>> norm = ckpt_kernels.nn.InstanceNorm2d(4, activation="relu")
        >>> x = torch.randn(2, 4, 8, 8)
        >>> torch.allclose(norm(x), torch.relu(torch.nn.InstanceNorm2d(4)(x)), atol=1e-5)
        True

    Errors and source: `functional.instance_norm`.
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    r"""`torch.nn.InstanceNorm3d` with an activation, as one block.

    .. math::
        y = \mathrm{act}(\mathrm{InstanceNorm}(x))

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch's, which may have more.
        activation: act, applied to the normalised value.

    Shape:
        `(N, C, D, H, W)`, or `(C, D, H, W)` of one sample; to the same, contiguous. Parameters and buffers are torch's.

    Kept for backward:
        The input (of one that is channels last a contiguous copy) and two numbers for each channel of each sample.

    Example:
        >>> norm = ckpt_kernels.nn.InstanceNorm3d(4, activation="relu")
        >>> x = torch.randn(2, 4, 4, 4, 4)
        >>> torch.allclose(norm(x), torch.relu(torch.nn.InstanceNorm3d(4)(x)), atol=1e-5)
        True

    Errors and source: `functional.instance_norm`.
    """
