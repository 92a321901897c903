"""Moves the alias champion to the run's model, where the gate allows it.

spark-submit --properties-file conf/spark.conf jobs/promote.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("promote")
