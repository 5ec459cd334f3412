"""Table S1: training cost and accuracy of FDDA and of the systems that use no real image.

    python python/table_s1_zeroshot_cost.py                 one seed, ten minutes of a core
    python python/table_s1_zeroshot_cost.py --budget full --bits W3A3
    python python/table_s1_zeroshot_cost.py --preset paper --budget full \\
        --model torchvision:resnet18 --data imagenet:PATH

Every method follows the schedule of its own preset to the end; times are measured here, those that
were published stand beside. What was stopped goes on.
"""

from common import cost_table

from fdda_ext.engine import run_command

METHODS = ("di", "adi", "zeroq", "dsg", "gdfq", "qimera", "zaq", "fdda")

if __name__ == "__main__":
    run_command(lambda: cost_table(__doc__, "table_s1", METHODS))
