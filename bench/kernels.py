"""GPU kernels: agreement with decode-and-multiply, then speed; gpu_kernels.py says how.

A file of its own: transformers imports a module named `kernels` where it finds one, and benchmarks
have this folder on their path.
"""

if __name__ == "__main__":
    import gpu_kernels

    gpu_kernels.main()
