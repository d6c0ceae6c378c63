"""`python -m mlx_lora.train`: the command `mlx-lora train` under the name that many documents give it.

Only Python's -m runs this file. Do not import it: its name would hide the function `mlx_lora.train`.
"""

from mlx_lora.cli.train import main

if __name__ == "__main__":
    main()
