"""Train shards and LR weights to the LC models, by TorchDistributor.

spark-submit --properties-file conf/spark.conf jobs/train_lc.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("train_lc")
