"""`python -m mlx_lora.train`: the command `mlx-lora train` under the name that many documents give it.

`mlx_lora.train` is a function, which a module of that name would hide. So an import of this file gives the function. A worker
process that a reward starts runs this file again as `__mp_main__`, where it needs neither.
"""

import sys

if __name__ == "__main__":
    from mlx_lora.cli.train import main

    main()
elif __name__ != "__mp_main__":
    from mlx_lora.api.train import train

    sys.modules[__name__] = train  # type: ignore[assignment]
