"""Small models of torchvision and transformers for tests/integration, from configurations, in float64."""

import importlib.util

import torch

STEPS = 4

if importlib.util.find_spec("torchvision"):
    from support import torchvision_models  # before transformers, which imports torchvision where it is installed


def _resnet18(p):
    return torchvision_models.resnet18(num_classes=4)


def _convnext(p):
    block = torchvision_models.convnext.CNBlockConfig
    return torchvision_models.ConvNeXt([block(16, 32, 1), block(32, None, 1)], stochastic_depth_prob=p, num_classes=4)


def _vit(p):
    return torchvision_models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, dropout=p, num_classes=4
    )


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 32}


def _gpt2(p):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 32, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=p, embd_pdrop=p, attn_pdrop=0.0, use_cache=False))


def _bert(p):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        **SIZES,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return BertForMaskedLM(config)


def _llama(p):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=16)
    config.attention_dropout, config.use_cache = p, False
    return LlamaForCausalLM(config)


MODELS = {}
if importlib.util.find_spec("torchvision"):
    MODELS.update(resnet18=_resnet18, convnext=_convnext, vit=_vit)
if importlib.util.find_spec("transformers"):
    MODELS.update(gpt2=_gpt2, bert=_bert, llama=_llama)


def make(name, p):
    torch.manual_seed(1)
    return MODELS[name](p).double().train()


def batches(name, count=STEPS):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        if name in ("resnet18", "convnext", "vit"):
            images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
            yield {"images": images, "labels": torch.randint(4, (4,), generator=generator)}
        else:
            ids = torch.randint(1, 32, (4, 12), generator=generator)
            yield {"input_ids": ids, "labels": ids}


def loss_of(model, batch):
    if "images" in batch:
        return torch.nn.functional.cross_entropy(model(batch["images"]), batch["labels"])
    return model(**batch).loss


def losses_of(model, name, part=lambda batch: batch, optimizer=torch.optim.SGD):
    optimizer = optimizer(model.parameters(), lr=0.05)
    losses = []
    for batch in batches(name):
        loss = loss_of(model, part(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
