"""Talk to a trained model in the browser, or from any OpenAI client.

python -m scripts.chat_web                       then open http://127.0.0.1:8000
python -m scripts.chat_web --stage=base --port=8001
NANOCHAT_API_KEY=long-secret python -m scripts.chat_web --host=0.0.0.0 --allow-host=gpu7.example.org
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from nanochat import config, errors
from nanochat.config import DeviceSettings, setting
from nanochat.home import Home
from nanochat.server.door import Door, listen

if TYPE_CHECKING:
    from nanochat.engine import Engine


@dataclass(frozen=True)
class Settings(DeviceSettings):
    stage: str | None = setting(None, "rl, sft, mid or base (default: the most trained one)")
    step: int | None = setting(None, "optimizer step of the checkpoint (default: the newest)")
    name: str | None = setting(None, "the model's id for clients (default: TAG-STAGE)")
    host: str = setting("127.0.0.1", "address to listen on; others than this machine's need NANOCHAT_API_KEY")
    port: int = setting(8000, "port to listen on (0: any free one)")
    allow_host: str = setting("", "further names of this server in the Host header, comma-separated")
    allow_origin: str = setting(
        "", "web pages that may call the API, as https://chat.example.org, comma-separated"
    )
    temperature: float = setting(0.6, "where a request names none")
    top_k: int = setting(50, "where a request names none (0: all tokens)")
    rows: int = setting(8, "answers computed at a time, on each replica")
    waiting: int = setting(64, "requests that may wait; more are told to come back (429)")
    per_key: int = setting(0, "requests of one API key at a time (0: no limit)")
    drain: float = setting(30.0, "seconds that answers have to finish after SIGTERM")
    replicas: int | None = setting(None, "copies of the model (default: one a GPU)")
    log: bool = setting(True, "write a line of JSON per request to stderr; never what was said")
    dtype: str | None = setting(None, "float32, bfloat16 or int8 (default: see docs/engine.md)")
    speculate: int = setting(0, "tokens guessed at most a step; answers stay the same (0: none)")


PRESETS = {name: Settings() for name in ("smoke", "cpu-demo", "single-gpu", "speedrun")}


def main(argv: list[str] | None = None) -> None:
    settings = config.parse(Settings, PRESETS, argv, __doc__)
    keys = names(os.environ.get("NANOCHAT_API_KEY", ""))
    if any(len(key) < 8 for key in keys):
        raise errors.UserError(
            "NANOCHAT_API_KEY holds a key of less than 8 characters", "openssl rand -hex 24 makes a good one"
        )
    hosts = [settings.host, *names(settings.allow_host)]
    with listen(settings.host, settings.port, bool(keys)) as listener, Door(listener, hosts) as door:
        host, port = listener.getsockname()[:2]
        serve(settings, keys, hosts, door, f"http://{f'[{host}]' if ':' in host else host}:{port}")


def serve(settings: Settings, keys: list[str], hosts: list[str], door: Door, where: str) -> None:
    """Load the model and answer at the door until a signal ends it."""
    from nanochat.chat_ui.session import open_engine
    from nanochat.server.app import create_app
    from nanochat.server.middleware import log_line
    from nanochat.server.serving import make_server, settle

    opened = open_engine(
        Home.find(settings.home), settings.tag, settings.stage, settings.step, settings.device,
        settings.dtype, settings.speculate,
    )  # fmt: skip
    app = create_app(
        replicas(opened.engine, settings.replicas),
        settings.name or f"{settings.tag}-{opened.stage}",
        temperature=settings.temperature,
        top_k=settings.top_k,
        num_rows=settings.rows,
        max_waiting=settings.waiting,
        max_per_key=settings.per_key,
        keys=keys,
        hosts=hosts,
        origins=names(settings.allow_origin),
        log=log_line if settings.log else None,
        note=opened.warning,
    )
    settle()
    if opened.warning:
        print(f"note: {opened.warning}")
    print(f"{settings.tag}/{opened.stage}, step {opened.step}: open {where} (Ctrl-C ends it)", flush=True)
    make_server(app, settings.drain, door).run()


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def replicas(engine: Engine, count: int | None) -> list[Engine]:
    """The engine and copies of it: one on each further GPU, or beside it on a CPU. Raises UserError."""
    import torch

    from nanochat.engine import Engine
    from nanochat.gpt import GPT

    device = engine.model.get_device()
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    count = count or max(1, num_gpus)
    if count < 1 or (num_gpus and count > num_gpus):
        raise errors.UserError(
            f"--replicas must be from 1 to {max(1, num_gpus)}, found {count}", "leave it out"
        )
    found = [engine]
    for index in range(1, count):
        place = torch.device("cuda", index) if num_gpus else device
        model = cast(GPT, copy.deepcopy(engine.model)).to(place)
        found.append(Engine(model, engine.tokenizer, engine.dtype, speculate=engine.speculate))
    return found


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
