{{/* A worker's pod template. `part` is "worker", which serves, or "worker-node", which lends its GPUs to one over Ray. */}}
{{- define "ascendra.workerPod" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $serves := eq .part "worker" -}}
metadata:
  labels: {{- include "ascendra.labels" (list $root .part) | nindent 4 }}
    ascendra.dev/pool: {{ .poolName }}
    ascendra.dev/role: {{ $pool.role }}
  annotations:
    {{- include "ascendra.checksum" .config | nindent 4 }}
    {{- with $pool.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "ascendra.podCommon" (list $root $pool) | nindent 2 }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  # SIGTERM starts the drain (drain-timeout-s): not ready at once, streams finish or move. No preStop hook is needed.
  terminationGracePeriodSeconds: {{ include "ascendra.grace" $root }}
  initContainers:
    - {{- include "ascendra.waitForModel" (list $root .image) | nindent 6 }}
  containers:
    - name: {{ .part }}
      image: {{ include "ascendra.image" (list $root .image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- if not $serves }}
      command:
        - sh
        - -c
        - until ray start --address="$LWS_LEADER_ADDRESS:6379" --disable-usage-stats --block; do sleep 2; done
      lifecycle:
        # The whole group is stopped at once: lend the GPUs until the leader has drained.
        preStop:
          exec:
            command:
              - sh
              - -c
              - while python -c 'import os, socket; socket.create_connection((os.environ["LWS_LEADER_ADDRESS"], 6379), 2)'; do sleep 1; done
      {{- else if gt .nodes 1 }}
      command:
        - sh
        - -c
        - ray start --head --port=6379 --disable-usage-stats && exec python -m services.worker --config /etc/ascendra/worker.yaml
      {{- else }}
      args: [--config, /etc/ascendra/worker.yaml]
      {{- end }}
      env:
        - {name: ASCENDRA_WORKER_ID, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        # Where other workers read the KV cache of streams that move to them.
        - {name: ASCENDRA_KV_TRANSFER_HOST, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        # The image names its own engine; a pool may ask for the emulated one.
        - {name: ASCENDRA_ENGINE, value: {{ $pool.engine }}}
        {{- if gt .nodes 1 }}
        - {name: VLLM_HOST_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        {{- end }}
        {{- with $pool.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if $serves }}
      ports:
        - {name: grpc, containerPort: 50061}
        - {name: metrics, containerPort: 50090}
      # It listens once the model is loaded. After startupSeconds it ends itself and says where it hangs; the probe is
      # for what cannot.
      startupProbe:
        {{- include "ascendra.grpcProbe" (list $root 50061) | nindent 8 }}
        periodSeconds: 5
        failureThreshold: {{ add (div $pool.startupSeconds 5) 12 }}
      readinessProbe:
        {{- include "ascendra.grpcProbe" (list $root 50061) | nindent 8 }}
        periodSeconds: 2
        failureThreshold: 2
      # Green while it drains. A dead engine ends the process, which the kubelet then starts again.
      livenessProbe:
        httpGet: {path: /live, port: metrics}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      {{- end }}
      resources:
        {{- $resources := deepCopy $pool.resources }}
        {{- if .gpus }}
        {{- $resources = mergeOverwrite $resources (dict "limits" (dict $pool.gpuResource .gpus)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      securityContext: {{- include "ascendra.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/ascendra, readOnly: true}
        - {name: models, mountPath: /models, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if $root.Values.tls.enabled }}
        - {name: tls, mountPath: /etc/ascendra-tls, readOnly: true}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ .name }}}
    - {{- include "ascendra.modelVolume" $root | nindent 6 }}
    # Caches of vLLM and torch, and the kernels they compile.
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $pool.sharedMemory }}}
    {{- if $root.Values.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "ascendra.tlsSecret" (list $root "worker") }}, defaultMode: 0440}
    {{- end }}
{{- end -}}
