"""The scripted engine's routes: OpenAI's and Anthropic's inference, health, metrics, models, and the control calls."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from server.engine import control as control_routes
from server.engine.control import Control
from server.engine.scripted_forms import ChatForm, CompletionForm
from server.engine.scripted_messages import MessagesForm
from server.engine.scripted_models import ScriptedModels
from server.engine.scripted_responses import ResponsesForm

FORMS = {
    "/v1/chat/completions": ChatForm,
    "/v1/completions": CompletionForm,
    "/v1/responses": ResponsesForm,
    "/v1/messages": MessagesForm,
}


def build_app(models: ScriptedModels, control: Control) -> Starlette:
    app = Starlette(
        routes=[
            Route("/health", _health),
            Route("/metrics", _metrics),
            Route("/v1/models", _models),
            *(Route(path, form.answer, methods=["POST"]) for path, form in FORMS.items()),
        ]
    )
    app.state.models = models
    control_routes.attach(app, lambda request: control)
    return app


async def _health(request: Request) -> Response:
    return Response()


async def _metrics(request: Request) -> Response:
    models: ScriptedModels = request.app.state.models
    name = "vllm:num_requests_running"
    return PlainTextResponse(f'# TYPE {name} gauge\n{name}{{model_name="{models.base_id}"}} {models.running}\n')


async def _models(request: Request) -> Response:
    models: ScriptedModels = request.app.state.models
    rows = [{"id": name, "object": "model", "created": 0, "owned_by": "vllm"} for name in models.effects]
    return JSONResponse({"object": "list", "data": rows})
