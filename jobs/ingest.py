"""Source rows of a day, or all, to Delta raw and rejected.

spark-submit --properties-file conf/spark.conf jobs/ingest.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("ingest")
