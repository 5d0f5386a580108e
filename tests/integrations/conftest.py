"""Each framework pins other versions than hlora's tests, so each has an environment of its own: see CONTRIBUTING.md."""

from importlib.util import find_spec

NEEDED = {"test_axolotl.py": "axolotl", "test_llama_factory.py": "llamafactory", "test_ms_swift.py": "swift"}
collect_ignore = [file for file, package in NEEDED.items() if find_spec(package) is None]
