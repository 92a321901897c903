"""Train shards to the LR model and Delta lr_weights.

spark-submit --properties-file conf/spark.conf jobs/train_lr.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("train_lr")
