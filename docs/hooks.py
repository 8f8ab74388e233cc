"""Pages of the site that stand elsewhere in the repository: they are written once."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK_TO_README = "[README](../../README.md#measure-it-yourself)"
PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "results.md": "bench/results/README.md",
    "images/amd-epyc-2-threads.png": "bench/results/amd-epyc-2-threads.png",
    "images/fashion_mnist.png": "bench/results/fashion_mnist.png",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        path = ROOT / source
        if path.suffix == ".md":
            text = path.read_text().replace(LINK_TO_README, "[Benchmarks](benchmarks.md)").replace("](docs/", "](")
            files.append(File.generated(config, page, content=text))
        else:
            files.append(File.generated(config, page, abs_src_path=str(path)))
    return files
