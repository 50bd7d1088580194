"""Small configurations of networks from libraries without a registry that could be run as it is: data for ``coverage.py``.

A row is a name, what makes the network, and what it is called with; where that is None the inputs are found by trying, as for the registries.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from coverage_check import Given, image
from torch import Tensor, nn

__all__ = ["CATALOGUE"]

Row = tuple[str, Callable[[], nn.Module], Given | None]
WORDS = 64


def tokens(*shape: int) -> Tensor:
    """Word numbers below ``WORDS``, none of them special."""
    return torch.randint(5, WORDS, shape, generator=torch.Generator().manual_seed(len(shape)))


def signal(*shape: int) -> Tensor:
    """Numbers around 0."""
    return 2 * image(*shape) - 1


def given(text: str, inputs: Callable[[int], Any]) -> Given:
    return Given(text=text, inputs=inputs)


def pixels(channels: int, *size: int) -> Given:
    """One batch of images or volumes as the only argument."""
    return given(f"{channels}x{'x'.join(map(str, size))}", lambda b: image(b, channels, *size))


def made(module: str, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """``module.name(*args, **kwargs)``; the module is imported when the network is made."""
    factory: Any = importlib.import_module(module)
    for part in name.split("."):
        factory = getattr(factory, part)
    model: nn.Module = factory(*args, **kwargs)
    return model


# transformers

PIXELS = given("pixel_values 3x64x64", lambda b: {"pixel_values": image(b, 3, 64, 64)})
PIXELS_224 = given("pixel_values 3x224x224", lambda b: {"pixel_values": image(b, 3, 224, 224)})
PIXELS_32 = given("pixel_values 3x32x32", lambda b: {"pixel_values": image(b, 3, 32, 32)})
TEXT = given("input_ids 12", lambda b: {"input_ids": tokens(b, 12), "attention_mask": torch.ones(b, 12, dtype=torch.long)})
WAVE = given("input_values 4000", lambda b: {"input_values": signal(b, 4000)})
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 64, "patch_size": 8}
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA = BERT | {"num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WAV2VEC = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_length": 2,
}
LEVELS = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "embedding_size": 16}
CLIP_TEXT = BERT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CLIP = {"text_config": CLIP_TEXT, "vision_config": VIT, "projection_dim": 32}
TEXT_AND_PIXELS = given("input_ids 12, pixel_values 3x64x64", lambda b: {"input_ids": tokens(b, 12), "pixel_values": image(b, 3, 64, 64)})


def huggingface(config: str, model: str, **options: Any) -> nn.Module:
    """A transformers model of a class from a configuration; both by name."""
    import transformers

    made_from = getattr(transformers, config)(**options)
    result: nn.Module = getattr(transformers, model)(made_from)
    return result


def hf(stem: str, task: str, inputs: Given, **options: Any) -> Row:
    return stem + task, partial(huggingface, stem + "Config", stem + task, **options), inputs


TRANSFORMERS: tuple[Row, ...] = (
    hf("ResNet", "ForImageClassification", PIXELS, **LEVELS, layer_type="basic"),
    hf("RegNet", "ForImageClassification", PIXELS, **LEVELS, groups_width=8),
    hf("ConvNext", "ForImageClassification", PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], num_stages=4),
    hf("ConvNextV2", "ForImageClassification", PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], num_stages=4),
    hf("MobileNetV1", "ForImageClassification", PIXELS, depth_multiplier=0.25),
    hf("MobileNetV2", "ForImageClassification", PIXELS, depth_multiplier=0.35),
    hf("MobileNetV2", "ForSemanticSegmentation", PIXELS, depth_multiplier=0.35),
    hf("MobileViT", "ForImageClassification", PIXELS, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 16, 16, 24, 24, 32, 48], image_size=64),
    hf("MobileViTV2", "ForImageClassification", PIXELS, width_multiplier=0.5, image_size=64),
    hf("EfficientNet", "ForImageClassification", PIXELS, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, image_size=64),
    hf(
        "Bit",
        "ForImageClassification",
        PIXELS,
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_groups=4,
    ),
    hf("PoolFormer", "ForImageClassification", PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64]),
    hf("Segformer", "ForSemanticSegmentation", PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=32),
    hf("GLPN", "ForDepthEstimation", PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 40, 64], decoder_hidden_size=32),
    hf("Pvt", "ForImageClassification", PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 40, 64], image_size=64),
    hf("PvtV2", "ForImageClassification", PIXELS, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 40, 64], image_size=64),
    hf("Cvt", "ForImageClassification", PIXELS, embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3]),
    hf("Levit", "ForImageClassification", PIXELS, image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1]),
    hf("Swin", "ForImageClassification", PIXELS, image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    hf("Swinv2", "ForImageClassification", PIXELS, image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    hf("Swin2SR", "ForImageSuperResolution", PIXELS_32, image_size=32, embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=4, upscale=2),
    hf("FocalNet", "ForImageClassification", PIXELS, image_size=64, embed_dim=16, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
    hf("SwiftFormer", "ForImageClassification", PIXELS, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48]),
    hf("TextNet", "ForImageClassification", PIXELS),
    hf("HGNetV2", "ForImageClassification", PIXELS),
    hf("ViT", "ForImageClassification", PIXELS, **VIT),
    hf("ViTMAE", "ForPreTraining", PIXELS, **VIT, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4),
    hf("ViTMSN", "ForImageClassification", PIXELS, **VIT),
    hf("DeiT", "ForImageClassification", PIXELS, **VIT),
    hf("Beit", "ForImageClassification", PIXELS, **VIT),
    hf("Data2VecVision", "ForImageClassification", PIXELS, **VIT),
    hf("Dinov2", "ForImageClassification", PIXELS, **VIT),
    hf("Dinov2WithRegisters", "ForImageClassification", PIXELS, **VIT),
    hf("IJepa", "ForImageClassification", PIXELS, **VIT),
    hf("Hiera", "ForImageClassification", PIXELS_224, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4]),
    hf("Yolos", "ForObjectDetection", PIXELS, **(VIT | {"image_size": [64, 64]}), num_detection_tokens=8),
    hf(
        "ImageGPT",
        "ForImageClassification",
        given("input_ids 16", lambda b: {"input_ids": tokens(b, 16)}),
        vocab_size=WORDS,
        n_positions=32,
        n_embd=32,
        n_layer=2,
    ),
    hf(
        "DPT",
        "ForDepthEstimation",
        PIXELS,
        **(VIT | {"num_hidden_layers": 4}),
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
    ),
    hf(
        "DepthAnything",
        "ForDepthEstimation",
        PIXELS,
        backbone_config={"model_type": "dinov2", **VIT, "out_indices": [1, 2], "apply_layernorm": True, "reshape_hidden_states": False},
        patch_size=8,
        reassemble_hidden_size=32,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[16, 16],
        fusion_hidden_size=16,
        head_hidden_size=16,
    ),
    hf(
        "UperNet",
        "ForSemanticSegmentation",
        PIXELS,
        backbone_config={"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "out_indices": [1, 2, 3, 4]},
        hidden_size=32,
        auxiliary_in_channels=48,
        auxiliary_channels=16,
    ),
    hf(
        "Detr",
        "ForObjectDetection",
        PIXELS,
        use_timm_backbone=False,
        backbone_config={"model_type": "resnet", **LEVELS, "layer_type": "basic", "out_indices": [4]},
        backbone=None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=10,
    ),
    hf(
        "MaskFormer",
        "ForInstanceSegmentation",
        PIXELS,
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "embed_dim": 16,
            "depths": [1, 1, 1, 1],
            "num_heads": [2, 2, 2, 2],
            "window_size": 2,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        decoder_config={
            "model_type": "detr",
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_queries": 10,
        },
    ),
    hf("SuperPoint", "ForKeypointDetection", PIXELS, encoder_hidden_sizes=[8, 16, 16, 16], decoder_hidden_size=32, descriptor_decoder_dim=32),
    hf(
        "VideoMAE", "ForVideoClassification", given("pixel_values 4x3x64x64", lambda b: {"pixel_values": image(b, 4, 3, 64, 64)}), **VIT, num_frames=4
    ),
    hf(
        "Timesformer",
        "ForVideoClassification",
        given("pixel_values 4x3x64x64", lambda b: {"pixel_values": image(b, 4, 3, 64, 64)}),
        **VIT,
        num_frames=4,
    ),
    hf(
        "Vivit",
        "ForVideoClassification",
        given("pixel_values 4x3x64x64", lambda b: {"pixel_values": image(b, 4, 3, 64, 64)}),
        **VIT,
        num_frames=4,
        tubelet_size=[2, 8, 8],
    ),
    hf("CLIP", "Model", TEXT_AND_PIXELS, **CLIP),
    hf("Siglip", "Model", TEXT_AND_PIXELS, **CLIP),
    hf("CLIPSeg", "ForImageSegmentation", TEXT_AND_PIXELS, **CLIP, extract_layers=[0, 1], reduce_dim=16, decoder_intermediate_size=32),
    hf("Blip", "ForConditionalGeneration", TEXT_AND_PIXELS, text_config=CLIP_TEXT | {"encoder_hidden_size": 32}, vision_config=VIT),
    hf("Vilt", "ForQuestionAnswering", TEXT_AND_PIXELS, **(VIT | BERT)),
    hf(
        "SamVision",
        "Model",
        PIXELS,
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=64,
    ),
    hf(
        "Whisper",
        "Model",
        given("input_features 80x60, decoder_input_ids 8", lambda b: {"input_features": signal(b, 80, 60), "decoder_input_ids": tokens(b, 8)}),
        vocab_size=WORDS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=30,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        use_cache=False,
    ),
    hf("Wav2Vec2", "ForCTC", WAVE, **WAV2VEC),
    hf("Hubert", "ForCTC", WAVE, **WAV2VEC),
    hf("WavLM", "ForCTC", WAVE, **WAV2VEC),
    hf("UniSpeechSat", "ForCTC", WAVE, **WAV2VEC),
    hf("SEW", "ForCTC", WAVE, **WAV2VEC, squeeze_factor=2),
    hf("Wav2Vec2Conformer", "ForCTC", WAVE, **WAV2VEC),
    hf("Data2VecAudio", "ForCTC", WAVE, **WAV2VEC, num_conv_pos_embeddings_groups=4),
    hf(
        "AST",
        "ForAudioClassification",
        given("input_values 64x32", lambda b: {"input_values": signal(b, 64, 32)}),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_length=64,
        num_mel_bins=32,
    ),
    hf(
        "Encodec",
        "Model",
        given("input_values 1x1600", lambda b: {"input_values": signal(b, 1, 1600)}),
        num_filters=8,
        hidden_size=16,
        codebook_size=16,
    ),
    hf(
        "Dac",
        "Model",
        given("input_values 1x1600", lambda b: {"input_values": signal(b, 1, 1600)}),
        encoder_hidden_size=8,
        decoder_hidden_size=64,
        codebook_size=16,
        n_codebooks=2,
    ),
    hf(
        "Mimi",
        "Model",
        given("input_values 1x1920", lambda b: {"input_values": signal(b, 1, 1920)}),
        num_filters=8,
        upsample_groups=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=64,
        codebook_size=16,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=4,
        use_cache=False,
    ),
    hf(
        "Vits",
        "Model",
        given("input_ids 12", lambda b: {"input_ids": tokens(b, 12)}),
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=64,
        flow_size=32,
        spectrogram_bins=33,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        upsample_initial_channel=64,
    ),
    hf("SpeechT5HifiGan", "", given("spectrogram 20x80", lambda b: {"spectrogram": signal(b, 20, 80)}), upsample_initial_channel=64),
    hf(
        "UnivNet",
        "Model",
        given("input_features 10x100", lambda b: {"input_features": signal(b, 10, 100)}),
    ),
    hf("Bert", "ForSequenceClassification", TEXT, **BERT),
    hf("ConvBert", "ForSequenceClassification", TEXT, **BERT, embedding_size=32, conv_kernel_size=3),
    hf("SqueezeBert", "ForSequenceClassification", TEXT, **BERT, embedding_size=32),
    hf(
        "Canine",
        "ForSequenceClassification",
        TEXT,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        num_hash_buckets=64,
    ),
    hf("GPT2", "LMHeadModel", TEXT, vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False),
    hf("Llama", "ForCausalLM", TEXT, **LLAMA),
    hf("Mixtral", "ForCausalLM", TEXT, **LLAMA, num_local_experts=4),
    hf(
        "T5",
        "ForConditionalGeneration",
        given("input_ids 12, decoder_input_ids 8", lambda b: {"input_ids": tokens(b, 12), "decoder_input_ids": tokens(b, 8)}),
        vocab_size=WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        use_cache=False,
    ),
    hf(
        "Mamba",
        "ForCausalLM",
        given("input_ids 12", lambda b: {"input_ids": tokens(b, 12)}),
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        use_cache=False,
    ),
    hf(
        "Mamba2",
        "ForCausalLM",
        given("input_ids 12", lambda b: {"input_ids": tokens(b, 12)}),
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        head_dim=8,
        num_heads=8,
        n_groups=2,
        chunk_size=8,
        use_cache=False,
    ),
    hf("Bamba", "ForCausalLM", TEXT, **LLAMA, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, attn_layer_indices=[1]),
    hf("RecurrentGemma", "ForCausalLM", TEXT, **(LLAMA | {"num_hidden_layers": 3}), lru_width=32, attention_window_size=16),
    hf("Lfm2", "ForCausalLM", TEXT, **LLAMA, layer_types=["conv", "full_attention"], conv_L_cache=3),
)


# diffusers


def diffuser(name: str, inputs: Given, label: str = "", **options: Any) -> Row:
    return name + label, partial(made, "diffusers", name, **options), inputs


def timed(name: str, *shape: int, **more: Callable[[int], Any]) -> Given:
    """A sample, the time step, and what else there is."""
    return given(
        ", ".join([f"{name} {'x'.join(map(str, shape))}", "timestep", *more]),
        lambda b: {name: signal(b, *shape), "timestep": torch.full((b,), 7)} | {key: value(b) for key, value in more.items()},
    )


CONTEXT = {"encoder_hidden_states": lambda b: signal(b, 6, 32)}
SAMPLE = given("sample 3x32x32", lambda b: {"sample": signal(b, 3, 32, 32)})
VIDEO = given("sample 3x5x32x32", lambda b: {"sample": signal(b, 3, 5, 32, 32)})
KL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
UNET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32, "attention_head_dim": 4}
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")

DIFFUSERS: tuple[Row, ...] = (
    diffuser("AutoencoderKL", SAMPLE, **KL),
    diffuser(
        "AsymmetricAutoencoderKL",
        SAMPLE,
        down_block_out_channels=(16, 32),
        up_block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
    ),
    diffuser("AutoencoderTiny", SAMPLE, encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4),
    diffuser(
        "AutoencoderDC",
        SAMPLE,
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        attention_head_dim=8,
        latent_channels=4,
    ),
    diffuser(
        "AutoencoderKLTemporalDecoder",
        given("sample 3x32x32, 2 frames", lambda b: {"sample": signal(2 * b, 3, 32, 32), "num_frames": 2}),
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
    ),
    diffuser("AutoencoderKLCogVideoX", VIDEO, block_out_channels=(16, 16, 32, 32), norm_num_groups=8, layers_per_block=1),
    diffuser("AutoencoderKLHunyuanVideo", VIDEO, block_out_channels=(16, 16, 32, 32), norm_num_groups=8, layers_per_block=1),
    diffuser("AutoencoderKLWan", VIDEO, base_dim=16, num_res_blocks=1),
    diffuser(
        "AutoencoderKLMochi",
        given("sample 3x7x32x32", lambda b: {"sample": signal(b, 3, 7, 32, 32)}),
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ),
    diffuser(
        "AutoencoderKLLTXVideo",
        given("sample 3x9x32x32", lambda b: {"sample": signal(b, 3, 9, 32, 32)}),
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_block_out_channels=(16, 32, 32, 32),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        latent_channels=8,
    ),
    diffuser(
        "AutoencoderOobleck",
        given("sample 2x1024", lambda b: {"sample": signal(b, 2, 1024)}),
        encoder_hidden_size=8,
        decoder_channels=8,
        decoder_input_channels=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
    ),
    diffuser(
        "VQModel",
        SAMPLE,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        num_vq_embeddings=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    diffuser(
        "UNet1DModel",
        timed("sample", 14, 32),
        in_channels=14,
        out_channels=14,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        block_out_channels=(16, 32),
        down_block_types=("DownResnetBlock1D",) * 2,
        up_block_types=("UpResnetBlock1D",),
        layers_per_block=1,
        out_block_type="OutConv1DBlock",
        mid_block_type="MidResTemporalBlock1D",
        act_fn="mish",
        freq_shift=1.0,
        flip_sin_to_cos=False,
    ),
    diffuser(
        "UNet2DModel",
        timed("sample", 3, 32, 32),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ),
    diffuser("UNet2DConditionModel", timed("sample", 4, 32, 32, **CONTEXT), **UNET, down_block_types=DOWN, up_block_types=UP, sample_size=32),
    diffuser(
        "UNet2DConditionModel",
        timed("sample", 4, 32, 32, **CONTEXT),
        " (convolutions for projections, scale-shift)",
        **UNET,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        sample_size=32,
    ),
    diffuser(
        "UNet3DConditionModel",
        timed("sample", 4, 4, 16, 16, **CONTEXT),
        **UNET,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        sample_size=16,
    ),
    diffuser(
        "UNetMotionModel",
        timed("sample", 4, 2, 16, 16, encoder_hidden_states=lambda b: signal(2 * b, 6, 32)),
        **{key: value for key, value in UNET.items() if key != "attention_head_dim"},
        num_attention_heads=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        motion_num_attention_heads=4,
        sample_size=16,
    ),
    diffuser(
        "UNetSpatioTemporalConditionModel",
        given(
            "sample 2x8x16x16, timestep, context, added_time_ids",
            lambda b: {
                "sample": signal(b, 2, 8, 16, 16),
                "timestep": torch.full((b,), 7),
                "encoder_hidden_states": signal(b, 1, 32),
                "added_time_ids": signal(b, 3),
            },
        ),
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=32,
        num_attention_heads=(4, 4),
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
        sample_size=16,
    ),
    diffuser(
        "UVit2DModel",
        given(
            "input_ids 8x8 and text",
            lambda b: {
                "input_ids": tokens(b, 8, 8),
                "encoder_hidden_states": signal(b, 6, 32),
                "pooled_text_emb": signal(b, 32),
                "micro_conds": signal(b, 5),
            },
        ),
        hidden_size=32,
        cond_embed_dim=32,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=32,
        vocab_size=WORDS,
        codebook_size=WORDS,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        sample_size=8,
    ),
    diffuser(
        "ControlNetModel",
        timed("sample", 4, 32, 32, **CONTEXT, controlnet_cond=lambda b: image(b, 3, 256, 256)),
        **UNET,
        down_block_types=DOWN,
        conditioning_embedding_out_channels=(8, 16, 16, 32),
    ),
    diffuser(
        "T2IAdapter",
        given("x 3x64x64", lambda b: {"x": image(b, 3, 64, 64)}),
        channels=[16, 32],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter",
    ),
    diffuser(
        "DiTTransformer2DModel",
        given(
            "hidden_states 4x16x16",
            lambda b: {"hidden_states": signal(b, 4, 16, 16), "timestep": torch.full((b,), 7), "class_labels": torch.zeros(b, dtype=torch.long)},
        ),
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=16,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=16,
    ),
    diffuser(
        "SD3Transformer2DModel",
        timed("hidden_states", 4, 16, 16, **CONTEXT, pooled_projections=lambda b: signal(b, 32)),
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    ),
    diffuser(
        "PixArtTransformer2DModel",
        timed("hidden_states", 4, 16, 16, **CONTEXT),
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        caption_channels=32,
        cross_attention_dim=16,
    ),
    diffuser(
        "SanaTransformer2DModel",
        timed("hidden_states", 4, 16, 16, **CONTEXT),
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=16,
    ),
    diffuser(
        "WanTransformer3DModel",
        timed("hidden_states", 4, 2, 16, 16, **CONTEXT),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    ),
    diffuser(
        "CogVideoXTransformer3DModel",
        timed("hidden_states", 2, 4, 16, 16, **CONTEXT),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=5,
        max_text_seq_length=6,
    ),
)


# ultralytics


def yolo(kind: str, *configurations: str) -> tuple[Row, ...]:
    return tuple((name, partial(made, "ultralytics.nn.tasks", kind, f"{name}.yaml", verbose=False), None) for name in configurations)


ULTRALYTICS: tuple[Row, ...] = (
    *yolo(
        "DetectionModel",
        "yolov3-tiny",
        "yolov5n",
        "yolov6n",
        "yolov8n",
        "yolov8n-ghost",
        "yolov8n-p2",
        "yolov9t",
        "yolov10n",
        "yolo11n",
        "yolo12n",
        "yolo26n",
    ),
    *yolo("SegmentationModel", "yolov8n-seg", "yolo11n-seg", "yolo26n-seg"),
    *yolo("PoseModel", "yolov8n-pose", "yolo11n-pose"),
    *yolo("OBBModel", "yolov8n-obb", "yolo11n-obb"),
    *yolo("ClassificationModel", "yolov8n-cls", "yolo11n-cls", "yolo12n-cls", "yolo26n-cls"),
    *yolo("RTDETRDetectionModel", "rtdetr-resnet50"),
)


# segmentation-models-pytorch


def segmenter(architecture: str, encoder: str) -> Row:
    return f"{architecture}-{encoder}", partial(made, "segmentation_models_pytorch", architecture, encoder, encoder_weights=None), None


ARCHITECTURES = ("UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet", "Segformer")
ENCODERS = (
    "resnet18",
    "vgg11_bn",
    "densenet121",
    "efficientnet-b0",
    "mobilenet_v2",
    "xception",
    "inceptionv4",
    "dpn68",
    "se_resnet50",
    "mit_b0",
    "mobileone_s0",
    "timm-regnetx_002",
    "tu-mobilenetv3_small_050",
    "tu-convnext_atto",
)

SEGMENTATION: tuple[Row, ...] = (
    *(segmenter(architecture, "resnet18") for architecture in ARCHITECTURES),
    *(segmenter("Unet", encoder) for encoder in ENCODERS),
    segmenter("DPT", "tu-vit_tiny_patch16_224"),
)


# monai


def medical(name: str, inputs: Given, *args: Any, label: str = "", **options: Any) -> Row:
    return name + label, partial(made, "monai.networks.nets", name, *args, **options), inputs


def volumes(size: int) -> Given:
    return pixels(1, size, size, size)


FLAT, SOLID = pixels(1, 64, 64), volumes(32)
THREE = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
TWO = THREE | {"spatial_dims": 2}
DYNAMIC = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 32]}

MONAI: tuple[Row, ...] = (
    medical("UNet", FLAT, **TWO, channels=(8, 16, 32), strides=(2, 2), num_res_units=2),
    medical("UNet", SOLID, **THREE, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, label=" 3d"),
    medical("AttentionUnet", SOLID, **THREE, channels=(8, 16, 32), strides=(2, 2)),
    medical("BasicUNet", SOLID, **THREE, features=(8, 8, 16, 32, 64, 8)),
    medical("BasicUNetPlusPlus", SOLID, **THREE, features=(8, 8, 16, 32, 64, 8)),
    medical("DynUNet", SOLID, **THREE, **DYNAMIC, res_block=True),
    medical("DynUNet", SOLID, **THREE, **DYNAMIC, deep_supervision=True, deep_supr_num=1, label=" deep supervision"),
    medical("SegResNet", SOLID, **THREE, init_filters=8),
    medical("SegResNetVAE", SOLID, input_image_size=(32, 32, 32), in_channels=1, out_channels=2, init_filters=8),
    medical("SegResNetDS", SOLID, **THREE, init_filters=8, blocks_down=(1, 2, 2)),
    medical("VNet", SOLID, **THREE),
    medical("AHNet", volumes(64), layers=(1, 1, 1, 1), psp_block_num=2, **THREE),
    medical("HighResNet", SOLID, **THREE),
    medical("UNETR", SOLID, in_channels=1, out_channels=2, img_size=32, feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4),
    medical("SwinUNETR", pixels(1, 64, 64, 64), in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
    medical("ViT", SOLID, in_channels=1, img_size=32, patch_size=8, hidden_size=48, mlp_dim=64, num_layers=2, num_heads=4, classification=True),
    medical("ViTAutoEnc", SOLID, in_channels=1, img_size=32, patch_size=16, hidden_size=48, mlp_dim=64, num_layers=2, num_heads=4),
    medical(
        "MaskedAutoEncoderViT",
        SOLID,
        in_channels=1,
        img_size=32,
        patch_size=8,
        hidden_size=48,
        mlp_dim=64,
        num_layers=2,
        num_heads=4,
        decoder_hidden_size=48,
        decoder_mlp_dim=64,
        decoder_num_layers=1,
        decoder_num_heads=4,
    ),
    medical("FlexibleUNet", pixels(3, 64, 64), in_channels=3, out_channels=2, backbone="resnet18", pretrained=False),
    medical("FlexibleUNet", pixels(3, 64, 64), in_channels=3, out_channels=2, backbone="efficientnet-b0", pretrained=False, label=" efficientnet"),
    medical("EfficientNetBN", pixels(3, 64, 64), "efficientnet-b0", pretrained=False),
    medical("DenseNet", SOLID, **THREE, init_features=8, growth_rate=4, block_config=(2, 2, 2)),
    medical("resnet10", SOLID, spatial_dims=3, n_input_channels=1, num_classes=2),
    medical(
        "SENet",
        FLAT,
        spatial_dims=2,
        in_channels=1,
        block="se_resnet_bottleneck",
        layers=(1, 1, 1, 1),
        groups=1,
        reduction=16,
        num_classes=3,
        dropout_prob=None,
        input_3x3=False,
        downsample_kernel_size=1,
        inplanes=64,
    ),
    medical("AutoEncoder", FLAT, **TWO, channels=(8, 16, 32), strides=(2, 2, 2)),
    medical("VarAutoEncoder", FLAT, spatial_dims=2, in_shape=(1, 64, 64), out_channels=1, latent_size=8, channels=(8, 16), strides=(2, 2)),
    medical(
        "AutoencoderKL",
        FLAT,
        **(TWO | {"out_channels": 1}),
        channels=(8, 16),
        latent_channels=4,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=(False, False),
    ),
    medical(
        "VQVAE",
        FLAT,
        **(TWO | {"out_channels": 1}),
        channels=(16, 16),
        num_res_channels=(16, 16),
        downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=16,
        embedding_dim=8,
    ),
    medical(
        "DiffusionModelUNet",
        given("x 1x32x32, timesteps, context", lambda b: {"x": signal(b, 1, 32, 32), "timesteps": torch.full((b,), 7), "context": signal(b, 3, 8)}),
        **(TWO | {"out_channels": 1}),
        num_res_blocks=1,
        channels=(8, 16),
        attention_levels=(False, True),
        norm_num_groups=4,
        num_head_channels=4,
        with_conditioning=True,
        transformer_num_layers=1,
        cross_attention_dim=8,
    ),
    medical(
        "ControlNet",
        given(
            "x 1x32x32, timesteps, cond",
            lambda b: {"x": signal(b, 1, 32, 32), "timesteps": torch.full((b,), 7), "controlnet_cond": image(b, 1, 64, 64)},
        ),
        spatial_dims=2,
        in_channels=1,
        num_res_blocks=1,
        channels=(8, 16),
        attention_levels=(False, True),
        norm_num_groups=4,
        num_head_channels=4,
        conditioning_embedding_in_channels=1,
        conditioning_embedding_num_channels=(8, 16),
    ),
    medical(
        "SPADEAutoencoderKL",
        given("images 1x32x32, seg 3x32x32", lambda b: (image(b, 1, 32, 32), image(b, 3, 32, 32))),
        spatial_dims=2,
        label_nc=3,
        in_channels=1,
        out_channels=1,
        channels=(8, 16),
        latent_channels=4,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=(False, False),
        spade_intermediate_channels=8,
    ),
    medical(
        "SPADENet",
        given("seg 3x64x64, image 1x64x64", lambda b: (image(b, 3, 64, 64), image(b, 1, 64, 64))),
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        label_nc=3,
        input_shape=[64, 64],
        channels=[8, 16, 32],
        z_dim=8,
    ),
    medical("Generator", given("noise 8", lambda b: signal(b, 8)), latent_shape=(8,), start_shape=(8, 8, 8), channels=(8, 1), strides=(2, 2)),
    medical("Discriminator", FLAT, in_shape=(1, 64, 64), channels=(8, 16), strides=(2, 2)),
    medical("PatchDiscriminator", FLAT, spatial_dims=2, num_layers_d=2, channels=8, in_channels=1),
    medical("RegUNet", FLAT, spatial_dims=2, in_channels=1, num_channel_initial=8, depth=2, out_channels=2),
    medical("GlobalNet", FLAT, image_size=(64, 64), spatial_dims=2, in_channels=1, num_channel_initial=8, depth=2),
    medical("VoxelMorph", given("pair of 1x32x32x32", lambda b: (image(b, 1, 32, 32, 32), image(b, 1, 32, 32, 32)))),
    medical("MedNeXt", SOLID, **THREE, init_filters=8, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1)),
    medical("HoVerNet", pixels(3, 256, 256), mode="fast", in_channels=3, out_classes=3),
    medical("Quicknat", FLAT, num_classes=3, num_channels=1, num_filters=8),
    medical("DAF3D", volumes(64), in_channels=1, out_channels=2),
    medical("MILModel", given("4 patches 3x64x64", lambda b: image(b, 4, 3, 64, 64)), num_classes=2, mil_mode="att", pretrained=False),
    medical("FullyConnectedNet", given("8", lambda b: signal(b, 8)), in_channels=8, out_channels=2, hidden_channels=(16, 16)),
)


CATALOGUE: dict[str, tuple[Row, ...]] = {
    "transformers": TRANSFORMERS,
    "diffusers": DIFFUSERS,
    "ultralytics": ULTRALYTICS,
    "segmentation_models_pytorch": SEGMENTATION,
    "monai": MONAI,
}
