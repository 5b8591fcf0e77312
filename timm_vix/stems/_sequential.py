"""The base class of stems of several layers. It checks the patch size, which a built stem cannot change."""

from typing import Any, Optional, Union

from timm.layers import PatchEmbed, to_2tuple

from .._checks import InputError

Size = Union[int, tuple[int, int]]


class SequentialStem(PatchEmbed):
    """timm's patch embedding for a projection of several layers; everything else (grid, padding, layout) is timm's.

    A stem of this kind makes its layers in ``build``.

    Args:
        patch_size: 1, 2, 4, 8 or 16; the stem's total stride.

    Raises:
        ValueError: for another patch size, and for fewer channels than its layers can have.
    """

    kind = ""

    def __init__(
        self,
        img_size: Optional[Size] = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        side = patch_size if isinstance(patch_size, int) else patch_size[0]
        if side not in (1, 2, 4, 8, 16) or (not isinstance(patch_size, int) and tuple(patch_size) != (side, side)):
            raise InputError(f"patch_size={patch_size}: {self.kind} stem takes 1, 2, 4, 8 or 16")
        dd = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, **kwargs, **dd)
        self.build(in_chans, embed_dim, bias, dd)

    def check_width(self, embed_dim: int, least: int) -> None:
        """Raise ValueError for an ``embed_dim`` of which a part would leave a layer no channel."""
        if embed_dim < least:
            raise InputError(
                f"embed_dim={embed_dim}: {self.kind} stem with patch_size={self.patch_size[0]} needs at least {least}"
            )

    def build(self, in_chans: int, embed_dim: int, bias: bool, dd: dict[str, Any]) -> None:
        """Set ``proj``, from an image to a map of ``embed_dim`` channels; ``dd``: device and dtype."""
        raise NotImplementedError

    def set_input_size(self, img_size: Optional[Size] = None, patch_size: Optional[Size] = None) -> None:
        """Take another image size; the patch size is the stride of the layers and stays."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise InputError(f"patch_size={patch_size}: {self.kind} stem was built for {self.patch_size[0]}")
        super().set_input_size(img_size=img_size)
