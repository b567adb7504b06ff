"""A checkpoint as a folder that transformers and vLLM load without our code.

Called by export.py. The folder holds config.json, model.safetensors, generation_config.json, tokenizer.json
and tokenizer_config.json with the chat template.
"""

import json
import os

import torch

from exports.portable import (
    XIELU,
    as_messages,
    chat_template,
    layer_weights,
    require,
    sample_conversations,
    separator_of,
)
from script import InputError
from tokenizer import encode_prompt

# Our names -> transformers' names inside model.layers.N.
NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
}
APERTUS_NAMES = NAMES | {"norm_1": "attention_layernorm", "norm_2": "feedforward_layernorm"}


def write_folder(model, tokenizer, architecture, folder, dtype, chat):
    """Fill an existing empty folder. dtype: "float32", "float16" or "bfloat16"; chat: with a chat template?

    Raises InputError if safetensors is missing, or if a weight does not fit into dtype."""
    require("safetensors", "hf")
    from safetensors.torch import save
    weights = {name: weight.to(getattr(torch, dtype))
               for name, weight in state_dict(model, architecture).items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise InputError(f"{name} holds values that do not fit into {dtype}; use --dtype float32")
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(save(weights, metadata={"format": "pt"}))
    files = {
        "config.json": config_of(model, tokenizer, architecture, dtype),
        "generation_config.json": generation_config_of(model, tokenizer),
        "tokenizer.json": tokenizer_of(tokenizer),
        "tokenizer_config.json": tokenizer_config_of(model, tokenizer, chat),
    }
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(content, f, ensure_ascii=False, indent=2)


def state_dict(model, architecture):
    """The weights under transformers' names; the tied output layer is not repeated."""
    names = APERTUS_NAMES if architecture.hf == "Apertus" else NAMES
    weights = {"model.embed_tokens.weight": model.transformer["wte"].weight.detach(),
               "model.norm.weight": model.transformer["ln_f"].weight.detach()}
    for i, block in enumerate(model.transformer["h"]):
        prefix = f"model.layers.{i}."
        for name, weight in layer_weights(block, model.config, permute=True).items():
            weights[f"{prefix}{names[name]}.weight"] = weight
        if architecture.hf == "Apertus":
            for name, value in XIELU.items():
                shape = [1] if name.startswith("alpha") else []
                weights[f"{prefix}mlp.act_fn.{name}"] = torch.full(shape, value)
    # safetensors refuses tensors that share memory, as the norms of ones do.
    return {name: weight.clone() for name, weight in weights.items()}


def special_ids(tokenizer):
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id}


def generation_config_of(model, tokenizer):
    """A small model answers best with its likeliest tokens; after max_length its positions are untrained."""
    return {**special_ids(tokenizer), "do_sample": False, "max_length": model.config.block_size}


def config_of(model, tokenizer, architecture, dtype):
    """config.json. What equals a default of transformers is written out too, for defaults differ: those of
    Apertus are llama3 RoPE, untied weights and other special ids."""
    c = model.config
    return {
        "architectures": [f"{architecture.hf}ForCausalLM"],
        "model_type": architecture.name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": model.transformer["h"][0].mlp.c_proj.weight.size(1),
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head or c.n_head,
        "head_dim": c.n_embd // c.n_head,
        "hidden_act": architecture.hidden_act,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # read by transformers 4, rope_parameters by 5
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        **special_ids(tokenizer),
    }


def tokenizer_of(tokenizer):
    """tokenizer.json: byte-pair encoding without merges is one token a character, and an unknown token for
    each character that the vocabulary lacks."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.stoi[token], "content": token, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True} for token in tokenizer.special_tokens],
        "normalizer": {"type": "Replace", "pattern": {"String": separator_of(tokenizer)}, "content": ""},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokenizer.itos[tokenizer.unknown_id],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": False, "vocab": tokenizer.stoi, "merges": [],
        },
    }


def tokenizer_config_of(model, tokenizer, chat):
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.itos[tokenizer.bos_id],
        "eos_token": tokenizer.itos[tokenizer.eos_id],
        "pad_token": tokenizer.itos[tokenizer.pad_id],
        "unk_token": tokenizer.itos[tokenizer.unknown_id],
    }
    if chat:
        config["chat_template"] = chat_template(tokenizer)
    return config


@torch.inference_mode()
def check_folder(model, tokenizer, folder, chat):
    """Load the folder with transformers and compare its token ids and logits with ours.

    Returns the largest difference of the logits and the largest logit. Raises InputError if an id differs."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                              local_files_only=True).eval()
    reader = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompts = []
    for turns, question in sample_conversations(tokenizer):
        if chat:
            ids = reader.apply_chat_template(as_messages(turns, question), tokenize=True, return_dict=False)
            ours = encode_prompt(tokenizer, turns, question).tolist()
        else:
            ids = reader(question)["input_ids"]
            ours = tokenizer.encode(question, allow_special=True).tolist()
        if ids != ours:
            raise InputError(f"{question!r} has other token ids in tokenizer.json than here; nothing written")
        prompts.append(ours)
    c = model.config
    generator = torch.Generator().manual_seed(0)
    prompts += torch.randint(c.vocab_size, (2, min(c.block_size, 128)), generator=generator).tolist()
    difference = largest = 0.0
    for prompt in prompts:
        idx = torch.tensor([prompt[:c.block_size]])
        logits = model(idx)[0]
        difference = max(difference, float((theirs(idx).logits - logits).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    return difference, largest
