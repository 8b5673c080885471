"""The client of the Admin service: which encoders a server holds."""

from byol_serving.client import Client
from byol_serving.client_calls import Call
from byol_serving.pb.byol.v1 import admin_pb2 as pb

_ADMIN = "/byol.v1.Admin/"


class AdminClient(Client):
    """A `Client` that can also load, switch and unload models."""

    def models(self) -> list[pb.ModelStatus]:
        """Every loaded version of every model."""
        call = Call(
            _ADMIN + "ListModels",
            pb.ListModelsRequest(),
            pb.ListModelsResponse,
            lambda answer: list(answer.models),
        )
        return self._send(call)

    def load_model(self, name: str = "", version: str = "") -> pb.ModelStatus:
        """Loads a version beside the others.

        Args:
            name: of the model; empty: the server's default.
            version: empty: the newest in the server's folder, or what its --bundle holds now.

        Raises:
            UnknownModel: there is no such bundle where the server looks for them.
            InvalidBundle: it is damaged, or fails its golden check.
        """
        request = pb.LoadModelRequest(name=name, version=version)
        return self._send(Call(_ADMIN + "LoadModel", request, pb.ModelStatus, _status))

    def switch_model(
        self, name: str = "", version: str = "", *, unload_previous: bool = False
    ) -> pb.ModelStatus:
        """Makes a version the one in use, with no failed request; loads it if need be.

        Arguments and errors as in `load_model`; `unload_previous` takes the former version out
        once its last request is answered.
        """
        request = pb.SwitchModelRequest(name=name, version=version, unload_previous=unload_previous)
        return self._send(Call(_ADMIN + "SwitchModel", request, pb.ModelStatus, _status))

    def unload_model(self, name: str, version: str = "") -> None:
        """Takes a version out; returns when its last request is answered.

        Raises:
            FailedPrecondition: it is in use, and not the last of its model.
        """
        request = pb.UnloadModelRequest(name=name, version=version)
        self._send(
            Call(
                _ADMIN + "UnloadModel",
                request,
                pb.UnloadModelResponse,
                lambda answer: None,
                repeatable=False,
            )
        )


def _status(answer: pb.ModelStatus) -> pb.ModelStatus:
    return answer
