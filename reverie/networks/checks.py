"""What networks of images refuse, in the same words."""

from torch import Tensor

from reverie.base.errors import UsageError


def check_images(x: Tensor, time: Tensor, channels: int) -> None:
    """Refuse images of another number of channels, and times that are not one for each.

    Raises:
        UsageError: They are such.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise UsageError(f"the images are {tuple(x.shape)}; this network takes (B, {channels}, H, W)")
    if time.shape != (len(x),):
        raise UsageError(f"time is {tuple(time.shape)}; it must hold one number for each image, ({len(x)},)")


def check_label(label: Tensor | None, due: tuple[int, ...] | None) -> None:
    """Refuse a label that is missing, not wanted, or of another shape.

    Arguments:
        label: What is given.
        due: The shape that it must have; None where the network takes none.

    Raises:
        UsageError: It is so.
    """
    if (label is None) != (due is None):
        wanted = "needs a label for each image" if label is None else "was built without classes; give no label"
        raise UsageError(f"this network {wanted}")
    if label is not None and label.shape != due:
        raise UsageError(f"label is {tuple(label.shape)}; it must be {due}")


def check_context(context: Tensor | None, count: int, channels: int | None) -> None:
    """Refuse a context that is missing, not wanted, or of another shape.

    Arguments:
        context: What is given.
        count: Images.
        channels: Channels that it must have; None where the network attends to none.

    Raises:
        UsageError: It is so.
    """
    if (context is None) != (channels is None):
        wanted = "needs a context for each image" if context is None else "attends to no context; give none"
        raise UsageError(f"this network {wanted}")
    if context is not None and (context.ndim != 3 or (len(context), context.shape[2]) != (count, channels)):
        raise UsageError(f"context is {tuple(context.shape)}; it must be ({count}, L, {channels})")
