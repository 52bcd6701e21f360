"""The baseline of dense prediction: UViM's decoder with the picture and no code."""

from __future__ import annotations

from torch import Tensor

from tessella.autoencoders.uvim import UViM


class UViMNoCode(UViM):
    """UViM whose decoder sees zeros where the codes would be: what the picture alone gives, by direct regression.

    How far a generated code gets beyond it is what the code is worth. Arguments are those of :class:`UViM`.
    """

    def decode(self, latent: Tensor, context: Tensor | None = None) -> Tensor:
        """See :meth:`UViM.decode`."""
        # Zeros with a gradient (of zero), so that every parameter has one.
        return super().decode(latent * 0, context)
