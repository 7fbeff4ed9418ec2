# On Google Colab only: installs famx, if it is missing, and restarts (see notebooks/README.md).
REPOSITORY = "https://github.com/OWNER/famx"
FOLDER = "/content/famx"  # an upload or a clone, which is taken in place of the repository


def install_on_colab():
    import glob
    import importlib.util
    import os
    import subprocess
    import sys

    from IPython import get_ipython

    found = importlib.util.find_spec("famx")
    installed = found is not None and found.origin is not None  # a folder of this name has no origin
    if "google.colab" not in sys.modules or installed:
        return
    extra, others = "", []
    if glob.glob("/dev/nvidia[0-9]*"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        if int(driver.split(".")[0]) >= 580:
            extra = "[cuda13]"
        else:  # a driver that is too old for CUDA 13
            others = ["jax[cuda12]"]
    elif glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        extra = "[tpu]"
    famx = f"{FOLDER}{extra}" if os.path.isdir(FOLDER) else f"famx{extra} @ git+{REPOSITORY}"
    pip = [sys.executable, "-m", "pip"]
    # Colab's own plugins are of another version than the JAX that famx needs.
    plugins = [f"jax-cuda{cuda}-{part}" for cuda in (12, 13) for part in ("plugin", "pjrt")]
    subprocess.run([*pip, "uninstall", "-q", "-y", *plugins], check=True)
    subprocess.run([*pip, "install", "-q", famx, *others], check=True)
    print("famx is installed. The runtime restarts now; then run all cells again (Runtime, Run all).")
    get_ipython().kernel.do_shutdown(restart=True)


install_on_colab()
