"""The triplet loss for Keras 3 on its torch backend.

::

    from triplet_ext.integrations.keras import triplet_loss

    model.compile(loss=triplet_loss, optimizer="adam")  # a model whose output is [B, 3, D]
    model.fit(triplets, labels)
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks, functional

__all__ = ["triplet_loss"]


def _keras() -> Any:
    """Keras, if it is one that works here."""
    needs, remedy = "triplet_ext.integrations.keras needs", "set KERAS_BACKEND=torch before Keras is imported"
    try:
        import keras
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("tensorflow", "jax", "openvino"):  # the default is tensorflow
            raise ImportError(f"{needs} Keras on the torch backend, got another ({error}): {remedy}") from error
        raise ImportError(f"{needs} Keras 3, which cannot be imported ({error}): pip install keras") from error
    version = getattr(keras, "__version__", "none")
    if version.split(".")[0] in ("none", "0", "1", "2"):
        raise ImportError(f"{needs} Keras 3, got version {version}: pip install --upgrade keras")
    if keras.config.backend() != "torch":
        raise ImportError(f"{needs} Keras on the torch backend, got {keras.config.backend()}: {remedy}")
    return keras


keras = _keras()


@keras.saving.register_keras_serializable(package="triplet_ext")
def triplet_loss(y_true: Any, y_pred: Any) -> torch.Tensor:
    """max(0, d(a, p) - d(a, n) + 1) of given triplets, with the squared Euclidean distance: a loss for ``compile``.

    :func:`triplet_ext.functional.triplet_loss`; the gradient, and what a row that is not finite does, are the same.
    For a margin of your own, write such a function; ``compile`` takes any.

    Args:
        y_true: ignored; Keras demands one, of any numbers, as long as the batch.
        y_pred: [B, 3, D], for each triplet the rows anchor, positive, negative; of a dtype out of float32, float64,
            float16, bfloat16. (Keras makes [B, 3] of [B, 3, 1] if y_true is [B, 1]. For D = 1 let it be [B].)

    Returns:
        One loss a triplet, [B], as Keras wants it: ``fit`` weights them by ``sample_weight`` and takes their mean.

    Raises:
        TypeError, ValueError: for a y_pred of another dtype or shape.
        ImportError: at the import of this module, if there is no Keras 3, or if its backend is not torch.
    """
    y_pred = keras.ops.convert_to_tensor(y_pred)
    if y_pred.dim() != 3 or y_pred.shape[1] != 3:
        shape = ", ".join(str(size) for size in y_pred.shape)
        raise ValueError(
            f"y_pred must have shape (B, 3, D), for each triplet the rows anchor, positive, negative, got ({shape})"
        )
    if y_pred.dtype not in _checks.FLOATING:
        raise TypeError(f"y_pred must be float32, float64, float16 or bfloat16, got {y_pred.dtype}")
    anchor, positive, negative = y_pred.unbind(1)
    return functional.triplet_loss(anchor, positive, negative, reduction="none")
