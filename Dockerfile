# The project as an image, for Kubeflow and other schedulers: `make image` (docs/deployment.md).
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE}
# GPU=1 puts TensorFlow with CUDA in the place of the one for processors.
ARG GPU=
WORKDIR /htr
ENV PATH=/opt/htr/bin:$PATH PYTHONUNBUFFERED=1 DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true \
    TF_CPP_MIN_LOG_LEVEL=2 GIT_PYTHON_REFRESH=quiet
COPY requirements.lock ./
RUN python3 -m venv /opt/htr \
    && pip install --no-cache-dir --disable-pip-version-check -r requirements.lock \
    && if [ -n "$GPU" ]; then \
        tensorflow="$(pip freeze | sed -nE 's/^tensorflow([-_]cpu)?==/tensorflow[and-cuda]==/p')" \
        && pip uninstall --yes tensorflow-cpu tensorflow \
        && pip install --no-cache-dir --disable-pip-version-check "$tensorflow"; \
    fi
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation -e . \
    && python -c 'from htr_pipeline.core.ctc.decoding import warm_up; warm_up()'
# There is no git in the image; runs in MLflow name this commit.
ARG COMMIT=unknown
ENV HTR_GIT_COMMIT=$COMMIT
