"""The files of this repository as one package: `pip install -e .`, then

    from sparsevila_reference.checkpoints import load
    from sparsevila_reference.sparsevila import SparseVILA

In the repository they are modules of their own, so that each can be copied and read alone, and they
import one another by their bare names. Installed so they would clash: PyPI has a `kernels` and an
`awq` as well, and transformers imports the first. Therefore this package, the only name that is
installed, finds the files itself and, wherever one imports another, puts its own name before it.
"""

import ast
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

FILES = ("kernels", "awq", "model", "checkpoints", "sparsevila", "baselines", "tiny", "tools")

_here = Path(__file__).resolve().parent
HOME = _here / "files" if (_here / "files").exists() else _here.parent  # a wheel; the repository


class _Qualify(ast.NodeTransformer):
    """`from kernels import linear` becomes `from sparsevila_reference.kernels import linear`."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if not node.level and node.module.split(".")[0] in FILES:
            node.module = f"{__name__}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> ast.Import | ast.ImportFrom:
        if node.names[0].name in FILES:
            return ast.copy_location(ast.ImportFrom(__name__, node.names, 0), node)
        return node


class _Loader(SourceFileLoader):
    def get_code(self, name: str):
        """Compiled anew each time: a .pyc would be taken for the file's own."""
        tree = ast.parse(self.get_data(self.path), self.path)
        return compile(_Qualify().visit(tree), self.path, "exec", dont_inherit=True)


class _Finder:
    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, inside = name.partition(".")
        if package != __name__ or inside.split(".")[0] not in FILES:
            return None
        file = HOME.joinpath(*inside.split("."))
        if (file / "__init__.py").is_file():
            file = file / "__init__"
        elif file.is_dir():  # tiny/ has no __init__.py
            return ModuleSpec(name, None, is_package=True)
        file = file.with_suffix(".py")
        within = [str(file.parent)] if file.stem == "__init__" else None
        loader = _Loader(name, str(file))
        return spec_from_file_location(name, file, loader=loader, submodule_search_locations=within)


sys.meta_path.insert(0, _Finder)
