"""A home with a tokenizer and random models, as training would leave them."""

from __future__ import annotations

from nanochat import checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home
from nanochat.tokenizer import RustBPETokenizer

TOK = RustBPETokenizer.train_from_iterator(["the sky is blue, the grass is green "] * 4, 290)


def save_model(home: Home, stage: str = "base", sequence_len: int = 64, tag: str = "main") -> None:
    """A model of that stage, step 7, with the meta that training writes."""
    TOK.save(home.tokenizer_dir)
    V = TOK.get_vocab_size()
    config = GPTConfig(sequence_len, V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L")
    model = GPT(config)
    model.init_weights(3)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    meta = {
        "model": vars(config), "inputs": {"tokenizer": TOK.fingerprint()}, "key": "k", "stage": stage,
        "settings": {"data": "synthetic", "seed": 1, "mixture": "smoke"},
        "recipe": {"batch_tokens": 1024, "lr_scale": 1.0},
    }  # fmt: skip
    checkpoint.save(home.checkpoints(tag, stage), 7, {"model": arrays}, {}, meta=meta)
