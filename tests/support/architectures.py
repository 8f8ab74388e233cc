"""Architectures of transformers and timm, small, from configurations: nothing is downloaded.

A model of transformers is made from its default configuration with every size reduced, one of timm as its smallest
variant.

    PYTHONPATH=tests python -m support.architectures [name ...]

prints the table of docs/architectures.md: the share of the work that dlkit reaches.
"""

import contextlib
import copy
import importlib.util
import os
import sys

import torch

import dlkit

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
if importlib.util.find_spec("torchvision"):
    from support import torchvision_models  # noqa: F401  (before transformers and timm, which import torchvision)

SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "hidden_dim": 32,
    "word_embed_proj_dim": 32,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_inner": 64,
    "n_inner": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_hidden_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "use_cache": False,
}
DROPPED = (
    "hidden_dropout_prob",
    "dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "dropout_rate",
    "resid_dropout",
)
DROPPED += ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "drop_path_rate", "activation_dropout")

# Settings of single models.
TRANSFORMERS = {
    "bert": {},
    "roberta": {},
    "albert": {},
    "electra": {},
    "distilbert": {},
    "mpnet": {},
    "deberta": {},
    "deberta-v2": {},
    "camembert": {},
    "xlm-roberta": {},
    "modernbert": {},
    "squeezebert": {"groups": 1},
    "layoutlm": {},
    "big_bird": {"attention_type": "original_full"},
    "xlnet": {"d_head": 8},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global"], 2]], "attention_layers": ["global"] * 2},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 4},
    "opt": {},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "cohere2": {},
    "starcoder2": {},
    "stablelm": {},
    "granite": {},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_oss": {},
    "glm": {},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "expand": 2, "chunk_size": 8},
    "t5": {},
    "mt5": {},
    "bart": {},
    "mbart": {},
    "pegasus": {},
    "marian": {},
    "m2m_100": {},
    "whisper": {},
    "wav2vec2": {"apply_spec_augment": False, "layerdrop": 0.0},
    "hubert": {"apply_spec_augment": False, "layerdrop": 0.0},
    "vit": {},
    "deit": {},
    "beit": {},
    "dinov2": {},
    "convnext": {"patch_size": 2, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "num_stages": 4},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    "segformer": {"hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4, "layer_type": "basic"},
    "clip": {},
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}

TIMM = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "seresnet50",
    "resnetv2_50",
    "resnet50d",
    "ecaresnet26t",
    "res2net50_26w_4s",
    "resnest14d",
    "skresnet18",
    "regnetx_002",
    "regnety_002",
    "regnetz_005",
    "efficientnet_b0",
    "tf_efficientnetv2_b0",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mnasnet_small",
    "ghostnet_050",
    "lcnet_050",
    "hardcorenas_a",
    "rexnet_100",
    "densenet121",
    "inception_v3",
    "inception_v4",
    "xception41",
    "dla34",
    "hrnet_w18_small",
    "vgg11_bn",
    "darknet53",
    "cspresnet50",
    "vovnet39a",
    "repvgg_a0",
    "mobileone_s0",
    "convnext_atto",
    "convnext_femto",
    "convnextv2_atto",
    "convformer_s18",
    "poolformer_s12",
    "poolformerv2_s12",
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "mixer_s32_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "coatnet_0_224",
    "coatnet_nano_rw_224",
    "maxvit_tiny_tf_224",
    "maxvit_nano_rw_256",
    "pit_ti_224",
    "levit_128s",
    "crossvit_tiny_240",
    "visformer_tiny",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "efficientformer_l1",
    "pvt_v2_b0",
    "twins_svt_small",
    "nest_tiny",
    "focalnet_tiny_srf",
    "davit_tiny",
    "inception_next_atto",
    "fastvit_t8",
    "hgnetv2_b0",
    "tiny_vit_5m_224",
]


def _cut(config, changes, p):
    from huggingface_hub.errors import StrictDataclassFieldValidationError

    for name, value in {**SMALL, **dict.fromkeys(DROPPED, p), **changes}.items():
        old = getattr(config, name, None)
        number = isinstance(old, (int, float)) and not isinstance(old, bool)
        known = hasattr(config, name) and (number or isinstance(value, bool) or name == "pad_token_id")
        if known or name in changes:
            # Computed fields, and those that count in other units, stay.
            with contextlib.suppress(AttributeError, NotImplementedError, StrictDataclassFieldValidationError):
                setattr(config, config.attribute_map.get(name, name), value)
    for name, part in vars(config).items():
        if hasattr(part, "to_dict"):
            _cut(part, changes.get(name, {}), p)


def make_transformer(name, p=0.1):
    """(model in training mode with dropouts of p, keyword arguments for it)."""
    from transformers import CONFIG_MAPPING, AutoModel

    torch.manual_seed(1)
    config = CONFIG_MAPPING[name]()
    _cut(config, TRANSFORMERS.get(name, {}), p)
    layers = getattr(config, "num_hidden_layers", None)
    if getattr(config, "layer_types", None) is not None and "layer_types" not in TRANSFORMERS.get(name, {}):
        with contextlib.suppress(AttributeError):
            config.layer_types = config.layer_types[:layers]
    model = AutoModel.from_config(config, experts_implementation="eager").train()  # other implementations lack float64
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 12), generator=generator)
    channels = getattr(config, "num_channels", None) or 3
    images = torch.randn(4, channels, 32, 32, generator=generator)
    kind = model.main_input_name
    if name in ("clip", "siglip"):
        return model, {"input_ids": ids, "pixel_values": images}
    if name == "whisper":
        sounds = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return model, {"input_features": sounds, "decoder_input_ids": ids}
    inputs = {"input_ids": ids, "pixel_values": images, "input_values": torch.randn(2, 8000, generator=generator)}[kind]
    batch = {kind: inputs}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return model, batch


def make_timm(name, p=0.1):
    """(model in training mode with dropouts and drop paths of p, its input)."""
    import timm

    torch.manual_seed(1)
    options = {"num_classes": 4, "drop_rate": p, "drop_path_rate": p}
    for leave in ((), ("drop_path_rate",), ("drop_rate", "drop_path_rate")):
        try:
            model = timm.create_model(name, pretrained=False, **{k: v for k, v in options.items() if k not in leave})
            break
        except TypeError:
            continue
    size = model.default_cfg["input_size"][1]
    size = size if model.default_cfg.get("fixed_input_size") else min(size, 96 if "inception" in name else 64)
    return model.train(), torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def make(name, p):
    return make_timm(name, p) if name in TIMM else make_transformer(name, p)


def results(model, example, dtype, prepare=None):
    """Outputs, gradients of parameters, and buffers of one training step; ``prepare``: called with the model before."""
    model = copy.deepcopy(model).to(dtype)
    if prepare:
        prepare(model)

    def cast(value):
        return value.to(dtype) if value.is_floating_point() else value

    torch.manual_seed(5)
    if isinstance(example, dict):
        output = model(**{name: cast(value) for name, value in example.items()})
    else:
        output = model(cast(example))
    outputs = [t for t in _tensors(output) if t.requires_grad]
    sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    return [t.detach().double() for t in (*outputs, *grads, *buffers)]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in values for tensor in _tensors(part)]


def distances(found, expected):
    """(largest, root mean square) difference, relative to the largest element of each tensor; tensors that are 0 except
    for rounding, like gradients of biases before a norm, relative to a thousandth of the largest of all."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.numel()]
    least = 1e-3 * max(float(b.abs().max()) for _, b in pairs)
    differences = [(a - b) / max(float(b.abs().max()), least) for a, b in pairs]
    largest = max(float(difference.abs().max()) for difference in differences)
    return largest, (sum(float(difference.square().mean()) for difference in differences) / len(differences)) ** 0.5


def assert_equal_in_float64(ours, model, example):
    """Training steps agree to 1e-12. Where a network multiplies rounding errors, as BatchNorms over a few values do, to
    ten times the effect of changing its input by one ulp."""
    expected = results(model, example, torch.float64)
    difference = distances(results(ours, example, torch.float64), expected)[0]
    if difference > 1e-12:
        noise = torch.rand(example.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) - 0.5
        moved = results(model, example.double() * (1 + 2.0**-51 * noise), torch.float64)
        assert difference < 10 * distances(moved, expected)[0], (difference, distances(moved, expected)[0])
    return difference


def shares(name):
    """By stage: (share of the norms' work, share of the dropouts' work) that dlkit reaches."""
    found = {}
    for stage, verify, override in (
        ("torch's layers", False, False),
        ("replace", True, False),
        ("override", True, True),
    ):
        model, example = make(name, 0.1)
        dlkit.replace(model, verify=verify)
        with dlkit.override() if override else contextlib.nullcontext():
            report = dlkit.report(model, example)
        found[stage] = report.share("norm"), report.share("dropout")
    return found


def main(names):
    torch.set_num_threads(1)
    print("| architecture | norms: torch's own layers | norms: replace | dropouts: replace | dropouts: override |")
    print("|---|---|---|---|---|")
    for name in names or [*TRANSFORMERS, *TIMM]:
        found = shares(name)
        columns = found["torch's layers"][0], found["replace"][0], found["replace"][1], found["override"][1]
        print(f"| {name} | " + " | ".join(f"{100 * share:.0f} %" for share in columns) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
