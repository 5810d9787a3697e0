PY := .venv/bin/python
PROTOS := protos/ascendra/v1

.PHONY: protos

protos: ## Generate the gRPC code (committed; a test fails when it and protos/ differ)
	.venv/bin/buf lint protos
	$(PY) -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. --mypy_grpc_out=. $(PROTOS)/*.proto
