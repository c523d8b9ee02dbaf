"""`make serve`: a ComfyUI with PrefGen in it, left up until Ctrl-C.

Its input, output and settings lie under output/serve; the ComfyUI folder itself is only read.
"""

from __future__ import annotations

import argparse
import sys
import time

from scripts.comfy_server import ROOT, ComfyServer, ServerError, exit_on_terminate
from scripts.setup_env import SetupError, find_comfyui


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make serve", description="ComfyUI with PrefGen in it (options in ARGS=...)")
    parser.add_argument("--port", type=int, help="the loopback port to listen on (default: a free one)")
    options = parser.parse_args(arguments)
    exit_on_terminate()
    print("Starting ComfyUI ...", flush=True)
    with ComfyServer(find_comfyui(), ROOT / "output" / "serve", port=options.port) as server:
        print(f"\n  PrefGen is up:  {server.address}\n")
        print("  Workflow > Browse Templates > prefgen > prefgen_atelier, then press Run (Queue).")
        print("  Your own taste: the sidebar Taste (the heart).")
        print(f"  It is kept as folders liked and disliked under {server.input_dir / 'prefgen'}/<its name>/")
        print(f"  Pictures: {server.output_dir}\n  Stop with Ctrl-C.", flush=True)
        while True:
            time.sleep(1)
            server.check_alive()


if __name__ == "__main__":
    try:
        main()
    except (SetupError, ServerError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nComfyUI is stopped.")
