"""A small convolutional auto-encoder of natural views. Each of its three decoders leaves different traces."""

from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, get_args

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Decoder = Literal["transposed", "nearest", "shuffle"]

DECODERS: Final[tuple[Decoder, ...]] = get_args(Decoder)
PACKAGED: Final = Path(__file__).parent.parent / "assets" / "autoencoders"
_WIDTHS: Final = (16, 32, 64, 64)  # channels at the full resolution of the view, a half, a quarter and an eighth
_LATENT: Final = 8


class Autoencoder(nn.Module):
    """Views -> their reconstructions, float32 [N, 3, H, W] in 0..1, H and W multiples of 8.

    The latent has eight channels at an eighth of each side: 24 values become one. `decoder` selects the up-sampling:
    transposed convolutions (which overlap unevenly), nearest neighbours and a convolution, or a pixel shuffle.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        down: list[nn.Module] = [_conv(3, _WIDTHS[0])]
        for narrow, wide in pairwise(_WIDTHS):
            down += [nn.SiLU(), _conv(narrow, wide, stride=2)]
        self.encoder = nn.Sequential(*down, nn.SiLU(), _conv(_WIDTHS[-1], _LATENT))
        up: list[nn.Module] = [_conv(_LATENT, _WIDTHS[-1])]
        for wide, narrow in pairwise(reversed(_WIDTHS)):
            up += [nn.SiLU(), _doubled(decoder, wide, narrow)]
        self.decoder = nn.Sequential(*up, nn.SiLU(), _conv(_WIDTHS[0], 3))

    def forward(self, views: Tensor) -> Tensor:
        """Reconstruct `views`."""
        result: Tensor = self.decoder(self.encoder(views))
        return result


def load(decoder: Decoder, folder: Path = PACKAGED) -> Autoencoder:
    """The trained auto-encoder with this decoder, in evaluation mode and without gradients."""
    weights = {name: value.float() for name, value in load_file(folder / f"{decoder}.safetensors").items()}
    autoencoder = Autoencoder(decoder)
    autoencoder.load_state_dict(weights)
    return autoencoder.eval().requires_grad_(False)


def save(autoencoder: Autoencoder, decoder: Decoder, folder: Path) -> None:
    """Write the weights for `load`, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in autoencoder.state_dict().items()}
    save_file(weights, folder / f"{decoder}.safetensors")


def _conv(channels: int, wanted: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(channels, wanted, 3, stride, padding=1)


def _doubled(decoder: Decoder, channels: int, wanted: int) -> nn.Module:
    if decoder == "transposed":
        return nn.ConvTranspose2d(channels, wanted, 3, stride=2, padding=1, output_padding=1)
    if decoder == "nearest":
        return nn.Sequential(nn.Upsample(scale_factor=2), _conv(channels, wanted))
    return nn.Sequential(_conv(channels, 4 * wanted), nn.PixelShuffle(2))
