#!/usr/bin/env bash
# tensorflow-datasets 4.9.10 imports importlib_resources and does not declare it.
#
# Where: installed by its own metadata, without TensorFlow, beside etils 1.15.0. Older releases of etils brought the
# package along, and kubernetes-validate and others still do, so the fault shows only in a small environment.
# Behaviour: `import tensorflow_datasets` works. A builder whose class stands in a package fails when it prepares its data,
# because the import is lazy: ModuleNotFoundError: No module named 'importlib_resources'.
# Who is hurt: whoever writes a data set of their own and installs only what tensorflow-datasets asks for.
# gptjax's extra `data` names importlib_resources, and tests/data/test_sources_formats.py reads such a data set.
# Exit 0: as described. Exit 1: the behaviour changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet "tensorflow-datasets==4.9.10" "etils==1.15.0"
mkdir "$folder/own" && touch "$folder/own/__init__.py"
cat > "$folder/own/builder.py" <<'PY'
import tensorflow_datasets as tfds


class Own(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": "a line"}
PY
program="from own.builder import Own; Own(data_dir='$folder/data', file_format='array_record').download_and_prepare()"
if "$folder/env/bin/pip" show importlib_resources > /dev/null 2>&1; then
  echo "changed: importlib_resources is installed with tensorflow-datasets"
  exit 1
fi
output=$(cd "$folder" && "$folder/env/bin/python" -c "$program" 2>&1 || true)
printf '%s\n' "$output" | tail -n 1
printf '%s' "$output" | grep -q "No module named 'importlib_resources'" || { echo "changed: another outcome"; exit 1; }
"$folder/env/bin/pip" install --quiet "importlib_resources>=6"
(cd "$folder" && "$folder/env/bin/python" -c "$program" > /dev/null 2>&1) || { echo "changed: still fails with the package"; exit 1; }
echo "as described: the same program runs once importlib_resources is installed"
