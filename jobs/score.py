"""Raw rows of a day, or all, and the champion to Delta scores.

spark-submit --properties-file conf/spark.conf jobs/score.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("score")
