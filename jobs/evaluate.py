"""Test shards and models to Delta evaluation, the report and the registered model.

spark-submit --properties-file conf/spark.conf jobs/evaluate.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("evaluate")
