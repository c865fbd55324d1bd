"""The optimizer: Muon for the matrices of the network, AdamW for the rest."""

import math
from typing import Any

import keras


class Muon(keras.optimizers.Muon):
    """Keras' Muon; kernels of convolutions are matrices of (rows x columns x inputs, outputs), gates one matrix each.

    Offsets, normalisation, the first convolution (a matrix of nine rows) and the layers of logits are left to AdamW.

    Args:
        learning_rate: of both; the update of a matrix is scaled to the size that AdamW's would have.
        weight_decay: of the kernels, decoupled, of both.
        clip_norm: the gradient is scaled down to this global norm; 0: it is not.
        products: type of the products that make a matrix orthogonal; bfloat16 is that of the source.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024); the scale is that of Liu et
        al., Muon is scalable for LLM training (arXiv 2502.16982).
    """

    def __init__(self, learning_rate: float, weight_decay: float, clip_norm: float, products: str = "float32") -> None:
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            adam_weight_decay=weight_decay,
            adam_beta_2=0.99,
            global_clipnorm=clip_norm or None,
        )
        self.products = products
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])

    def _should_use_adamw(self, variable: Any) -> bool:
        is_first = len(variable.shape) == 4 and variable.shape[2] == 1
        return len(variable.shape) not in (2, 4) or is_first or "logits" in variable.path

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        # Keras would sum the gradients over the replicas here; they are sums already (core/distribution.py), and every
        # replica changes its own copies.
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            self.update_step(gradient, variable, learning_rate)

    def _muon_update_step(self, gradient: Any, variable: Any, rate: Any, momentum: Any) -> None:
        momentum.assign(self.momentum * momentum + gradient)
        direction = gradient + self.momentum * momentum
        gates = 4 if "recurrent" in variable.path else 1
        matrices = keras.ops.stack(keras.ops.split(keras.ops.reshape(direction, (-1, direction.shape[-1])), gates, -1))
        updates = self.zeropower_via_newtonschulz5(keras.ops.cast(matrices, self.products), self.ns_steps)
        update = keras.ops.cast(keras.ops.concatenate(keras.ops.unstack(updates), axis=-1), direction.dtype)
        # Singular values near one, brought to the root mean square of AdamW's update.
        scale = self.rms_rate * math.sqrt(max(matrices.shape[1:]))
        variable.assign(variable - rate * scale * keras.ops.reshape(update, variable.shape))
