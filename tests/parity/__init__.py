"""Do we compute what other programs compute? Comparisons with PEFT, transformers and llama.cpp that are commands and tests.

    PYTHONPATH=tests python -m parity.peft_curves --model DIR --data FILE
    PYTHONPATH=tests python -m parity.transformers_steps
    PYTHONPATH=tests python -m parity.llamacpp FILE.gguf

They start children and describe the machine as the benchmarks do.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
