"""Check that the Hub has a model, with one quick request, before anything large is loaded.

Tests: tests/hf_vit/hub/test_upload.py.
"""

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from ..errors import HFViTError


def check_hub_access(name: str) -> None:
    """Ask the Hub for a model, once and quickly: transformers retries for a minute without a network.

    Raises:
        HFViTError: unreachable, unknown, private or gated. No error if it is in the cache, or in offline mode.
    """
    try:
        HfApi().model_info(name, timeout=10)
    except OfflineModeIsEnabled:
        pass
    except GatedRepoError as error:
        raise HFViTError(f"the Hub model '{name}' is gated; accept its terms and run `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise HFViTError(
            f"cannot load --model {name}: neither a local path nor a model on the Hub; check the name, or run "
            "`hf auth login` if it is private"
        ) from error
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            raise HFViTError(
                f"cannot load --model {name}: neither a local path nor a Hub model that can be reached now "
                f"({' '.join(str(error).split())[:200]}); give a folder or a checkpoint file, or go online"
            ) from error
