"""Is what was trained what answers? The same as `jaxgpt check`.

    python scripts/debug_inference_parity.py CKPT [--all] [--memorize] [--json]

Exit code 0 if nothing failed, 1 if a check failed, 2 if the checkpoint does not load.
"""

import argparse
import json
import sys

from jaxgpt.check import CheckLine, check
from jaxgpt.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="a run folder or one step folder")
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    parser.add_argument("--memorize", action="store_true", help="overfit a small batch whatever the model's size")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()

    def show(line: CheckLine) -> None:
        if not options.json:
            print(line, flush=True)

    try:
        report = check(
            options.checkpoint,
            all=options.all,
            memorize=options.memorize or None,
            device=options.device,
            report=show,
        )
    except InputError as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
