"""The script that MLflow runs to make the registered model again ("models from code")."""

from lc_spark.tracking import ClickModel, set_model

set_model(ClickModel())
