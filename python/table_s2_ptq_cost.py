"""Table S2: training cost and accuracy of FDDA and of methods that use a few real images.

    python python/table_s2_ptq_cost.py                      one seed, ten minutes on one core
    python python/table_s2_ptq_cost.py --budget full --images-per-class 16
    python python/table_s2_ptq_cost.py --preset paper --budget full \\
        --model torchvision:resnet18 --data imagenet:PATH

Every method runs the whole schedule of its own preset. The table shows the measured times next to
the published ones. The same command continues after an interruption.
"""

from common import cost_table

from fdda_ext.engine import run_command

METHODS = ("adaquant", "lapq", "bitsplit", "brecq", "qdrop", "fdda")

if __name__ == "__main__":
    run_command(lambda: cost_table(__doc__, "table_s2", METHODS))
