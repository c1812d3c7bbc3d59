"""C++ kernels for operators on a CPU: `build.py` compiles a source once per machine, a module beside each calls it."""
