"""Delta raw to the field map, Delta vocabulary and the shards.

spark-submit --properties-file conf/spark.conf jobs/build_features.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("features")
