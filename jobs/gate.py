"""The run's model and the champion, on the same test rows, to a verdict.

spark-submit --properties-file conf/spark.conf jobs/gate.py --config FILE [--date D]
"""

from lc_spark.cli import job

if __name__ == "__main__":
    job("gate")
