"""Answer or chat: `python inference_lora.py --base_model FOLDER --lora_model ./output_qwen_lora --chat`."""

import sys

from qingtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["infer", *sys.argv[1:]]))
