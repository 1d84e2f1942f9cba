"""Talk to a trained model in the browser, or from any OpenAI client.

python -m scripts.chat_web                       then open http://127.0.0.1:8000
python -m scripts.chat_web --stage=base --port=8001
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from nanochat import config, errors
from nanochat.config import setting
from nanochat.engine.session import open_engine
from nanochat.paths import Home

LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "name of the run")
    stage: str | None = setting(None, "rl, sft, mid or base (default: the most trained one)")
    step: int | None = setting(None, "optimizer step of the checkpoint (default: the newest)")
    host: str = setting("127.0.0.1", "address to listen on: this machine only")
    port: int = setting(8000, "port to listen on (0: any free one)")
    temperature: float = setting(0.6, "where a request names none")
    top_k: int = setting(50, "where a request names none (0: all tokens)")
    rows: int = setting(8, "answers computed at a time; each keeps a cache of the whole context")
    waiting: int = setting(64, "requests that may wait; more are told to come back (429)")
    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)")
    dtype: str | None = setting(None, "float32 or bfloat16 (default: float32, on a GPU bfloat16)")


PRESETS = {name: Settings() for name in ("smoke", "cpu-demo", "single-gpu", "speedrun")}


def main(argv: list[str] | None = None) -> None:
    settings = config.parse(Settings, PRESETS, argv, __doc__)
    import uvicorn

    from nanochat.web.server import create_app

    listener = listen(settings.host, settings.port)
    with listener:
        opened = open_engine(
            Home.find(settings.home),
            settings.tag,
            settings.stage,
            settings.step,
            settings.device,
            settings.dtype,
        )
        app = create_app(
            opened.engine,
            f"{settings.tag}-{opened.stage}",
            temperature=settings.temperature,
            top_k=settings.top_k,
            num_rows=settings.rows,
            max_waiting=settings.waiting,
            note=opened.warning,
        )
        if opened.warning:
            print(f"note: {opened.warning}")
        listener.listen()  # from here on connections wait for the server instead of failing
        host, port = listener.getsockname()[:2]
        print(
            f"{settings.tag}/{opened.stage}, step {opened.step}: open http://{host}:{port} (Ctrl-C ends it)",
            flush=True,
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this machine. Raises UserError for another address or a taken port."""
    if host not in LOOPBACK:
        raise errors.UserError(
            f"--host must be one of {', '.join(LOOPBACK)}, found {host!r}: the server has no passwords yet",
            "reach it from elsewhere through ssh -L 8000:127.0.0.1:8000 THIS-MACHINE",
        )
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise errors.UserError(f"cannot listen on port {port}: {error}", "choose another --port") from error
    return listener


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
