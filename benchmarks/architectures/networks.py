"""One small network with random weights of every architecture that spandrel has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


def _network(module: str, name: str, **arguments: Any) -> Callable[[], nn.Module]:
    """Makes `name(**arguments)` of the module `module` of spandrel's architectures, such as `HAT.__arch.HAT`."""

    def make() -> nn.Module:
        network: nn.Module = getattr(import_module(f"spandrel.architectures.{module}"), name)(**arguments)
        return network

    return make


_SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [2], "num_heads": [2], "mlp_ratio": 2}

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "ATD": _network(
        "ATD.__arch.atd_arch", "ATD", embed_dim=24, depths=(2,), num_heads=(2,), num_tokens=16, reducted_dim=4,
        upscale=2, upsampler="pixelshuffledirect",
    ),
    "AuraSR": _network(
        "AuraSR.__arch.aura_sr", "UnetUpsampler", dim=8, image_size=None, input_image_size=None,
        style_network={"dim_in": 16, "dim_out": 64, "depth": 2}, full_attn=(False, False, False, False, False),
        self_attn_dim_head=8, self_attn_heads=8, mid_attn_depth=1, num_conv_kernels=2, unconditional=True,
    ),
    "RealESRGAN Compact": _network("Compact.__arch.SRVGG", "SRVGGNetCompact", num_feat=16, num_conv=3),
    "CRAFT": _network("CRAFT.__arch.CRAFT", "CRAFT", embed_dim=24, depths=[1], num_heads=[6], upscale=2),
    "DAT": _network(
        "DAT.__arch.DAT", "DAT", embed_dim=32, depth=[2], num_heads=[2], split_size=[2, 4], expansion_factor=2.0,
    ),
    "DCTLSA": _network("DCTLSA.__arch.dctlsa", "DCTLSA", nf=20, num_modules=6, upscale=2),
    "DITN": _network("DITN.__arch.DITN_Real", "DITN_Real", dim=12, ITL_blocks=1, SAL_blocks=1, upscale=2),
    "DnCNN": _network("DnCNN.__arch.network_dncnn", "DnCNN", in_nc=3, out_nc=3, nc=16, nb=4),
    "DRCT": _network(
        "DRCT.__arch.drct_arch", "DRCT", embed_dim=24, depths=(6,), num_heads=(2,), window_size=8, upscale=2,
        upsampler="pixelshuffle", gc=8,
    ),
    "DRUNet": _network("DRUNet.__arch.network_unet", "DRUNet", in_nc=4, out_nc=3, nc=[8, 16, 16, 16], nb=2),
    "ESRGAN": _network("ESRGAN.__arch.RRDB", "RRDBNet", num_filters=8, num_blocks=1),
    "FBCNN": _network("FBCNN.__arch.FBCNN", "FBCNN", nc=[8, 8, 8, 512], nb=2),
    "FDAT": _network(
        "FDAT.__arch.fdat", "FDAT", scale=2, embed_dim=24, num_groups=1, depth_per_group=1, num_heads=2, mid_dim=16,
        upsampler_type="pixelshuffledirect",
    ),
    "FFTformer": _network("FFTformer.__arch.fftformer_arch", "FFTformer", dim=12, num_blocks=[1, 1, 1],
                          num_refinement_blocks=1),
    "GFPGAN": _network("GFPGAN.__arch.gfpganv1_clean_arch", "GFPGANv1Clean"),
    "GRL": _network(
        "GRL.__arch.grl", "GRL", embed_dim=16, depths=[2], num_heads_window=[2], num_heads_stripe=[2], upscale=2,
        upsampler="pixelshuffledirect", mlp_ratio=2.0,
    ),
    "HAT": _network("HAT.__arch.HAT", "HAT", **_SWIN, window_size=8, upscale=2, compress_ratio=3, squeeze_factor=4),
    "HVI-CIDNet": _network("HVICIDNet.__arch.cidnet", "CIDNet"),
    "IPT": _network("IPT.__arch.ipt", "IPT", patch_size=12, n_feats=8, scale=[2], num_heads=2, num_layers=1),
    "KBNet": _network("KBNet.__arch.kbnet_s", "KBNet_s", width=8, middle_blk_num=1, enc_blk_nums=[1, 1, 1, 1],
                      dec_blk_nums=[1, 1, 1, 1]),
    "LaMa": _network("LaMa.__arch.LaMa", "LaMa"),
    "MixDehazeNet": _network("MixDehazeNet.__arch.MixDehazeNet", "MixDehazeNet", embed_dims=[8, 16, 32, 16, 8]),
    "MMRealSR": _network(
        "MMRealSR.__arch.mmrealsr_arch", "MMRRDBNet_test", num_in_ch=3, num_out_ch=3, num_feat=16, num_block=1,
        num_grow_ch=8, num_feats=[8, 8, 8, 8], num_blocks=[1, 1, 1, 1],
    ),
    "MoESR": _network("MoESR.__arch.MoESR", "MoESR", scale=2, dim=16, n_blocks=1, n_block=1),
    "MoSR": _network("MoSR.__arch.mosr_arch", "MoSR", upscale=2, n_block=2, dim=16),
    "NAFNet": _network("NAFNet.__arch.NAFNet_arch", "NAFNet", width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
    "OmniSR": _network("OmniSR.__arch.OmniSR", "OmniSR", num_feat=16, res_num=1, up_scale=2),
    "PLKSR": _network("PLKSR.__arch.PLKSR", "PLKSR", dim=16, n_blocks=2, upscaling_factor=2),
    "RCAN": _network("RCAN.__arch.rcan_arch", "RCAN", scale=2, n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4),
    "RealCUGAN": _network("RealCUGAN.__arch.upcunet_v3", "UpCunet2x"),
    "RestoreFormer": _network("RestoreFormer.__arch.restoreformer_arch", "RestoreFormer", ch=32, n_embed=16),
    "RetinexFormer": _network("RetinexFormer.__arch.retinexformer_arch", "RetinexFormer", n_feat=8, stage=1),
    "RGT": _network("RGT.__arch.rgt", "RGT", embed_dim=16, depth=[2], num_heads=[2], mlp_ratio=2.0),
    "SAFMN": _network("SAFMN.__arch.safmn", "SAFMN", dim=16, n_blocks=2, upscaling_factor=2),
    "SAFMN BCIE": _network("SAFMNBCIE.__arch.safmn_bcie", "SAFMN_BCIE", dim=16, n_blocks=1, num_layers=1),
    "SCUNet": _network("SCUNet.__arch.SCUNet", "SCUNet", config=[1, 1, 1, 1, 1, 1, 1], dim=64),
    "SeemoRe": _network("SeemoRe.__arch.seemore_arch", "SeemoRe", scale=2, num_experts=2, num_layers=1,
                        embedding_dim=16),
    "SPAN": _network("SPAN.__arch.span", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2),
    "Swift-SRGAN": _network("SwiftSRGAN.__arch.SwiftSRGAN", "Generator", num_channels=16, num_blocks=1),
    "Swin2SR": _network("Swin2SR.__arch.Swin2SR", "Swin2SR", **_SWIN, window_size=8, upsampler="pixelshuffledirect"),
    "SwinIR": _network("SwinIR.__arch.SwinIR", "SwinIR", **_SWIN, window_size=8, upscale=2,
                       upsampler="pixelshuffledirect"),
    "Uformer": _network("Uformer.__arch.Uformer", "Uformer", embed_dim=8, depths=[1] * 9),
}  # fmt: skip


def random_state(name: str) -> dict[str, Tensor]:
    """The state of the network `name` with random weights; weights that start at zero get small values."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
