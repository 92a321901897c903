#!/usr/bin/env bash
# Two days of conf/flights_daily.yaml by spark-submit, a job a stage, and the score of the day after
# each. `make cluster-demo` calls it while a cluster is up, whose address is in LC_SPARK_MASTER.
set -eu
export PYSPARK_PYTHON="$PWD/.venv/bin/python"
folder=workspace/cluster_demo
workspace="workspace=$folder/flights_daily"
mkdir -p "$folder/logs"

submit() { # STAGE DAY
    log="$folder/logs/$2-$1.log"
    if ! .venv/bin/spark-submit --master "$LC_SPARK_MASTER" --properties-file conf/cluster.conf \
        --conf spark.ui.showConsoleProgress=false --py-files dist/lc_spark.zip \
        "jobs/$1.py" --config conf/flights_daily.yaml --date "$2" --set "$workspace" >"$log" 2>&1
    then
        tail -n 20 "$log"
        echo "Error: jobs/$1.py failed for $2; all that it said is in $log"
        exit 1
    fi
    grep -aoE '(rank [0-9]+ of|[0-9:]{8} [a-z_]+:) .*' "$log" | grep -av ': started'
}

for day in 1 2; do
    echo "== 2013-03-0$day"
    for stage in ingest build_features train_lr train_lc evaluate gate promote; do
        submit "$stage" "2013-03-0$day"
    done
    submit score "2013-03-0$((day + 1))"
done
.venv/bin/lc-spark champion conf/flights_daily.yaml --set "$workspace"
