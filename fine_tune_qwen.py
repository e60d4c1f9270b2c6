"""Train, by a JSON file or flags: `python fine_tune_qwen.py --config_file configs/train_config_lora.json`."""

import sys

from qingtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
