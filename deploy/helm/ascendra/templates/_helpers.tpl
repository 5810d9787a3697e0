{{- define "ascendra.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that select the pods of a component. Call with (list $ COMPONENT). */}}
{{- define "ascendra.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "ascendra.labels" -}}
{{ include "ascendra.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
{{- end -}}

{{- define "ascendra.image" -}}
{{- $root := index . 0 -}}
{{ $root.Values.image.registry }}/{{ index . 1 }}:{{ default $root.Chart.AppVersion $root.Values.image.tag }}
{{- end -}}

{{/* The routers by name. A StatefulSet's pods keep theirs. */}}
{{- define "ascendra.routers" -}}
{{- $host := printf "%s-router" (include "ascendra.fullname" .) -}}
{{- range $i := until (int .Values.router.replicas) }}
- {{ $host }}-{{ $i }}.{{ $host }}-pods.{{ $.Release.Namespace }}.svc:7100
{{- end }}
{{- end -}}

{{/* What the pods of every component have in common. Call with (list $ SETTINGS). */}}
{{- define "ascendra.podCommon" -}}
{{- $root := index . 0 -}}
{{- $settings := index . 1 -}}
automountServiceAccountToken: false
{{- with $root.Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $settings.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $settings.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $settings.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $settings.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "ascendra.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A ConfigMap with one service's file. Call with (list $ COMPONENT NAME FILE CONFIG). */}}
{{- define "ascendra.configMap" -}}
{{- $root := index . 0 -}}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ index . 2 }}
  labels: {{- include "ascendra.labels" (list $root (index . 1)) | nindent 4 }}
data:
  {{ index . 3 }}: |
    {{- toYaml (index . 4) | nindent 4 }}
{{- end -}}

{{/* A change of configuration is a change of the pod. */}}
{{- define "ascendra.checksum" -}}
checksum/config: {{ toYaml . | sha256sum }}
{{- end -}}

{{- define "ascendra.modelVolume" -}}
name: models
{{- if .Values.model.volume }}
{{ toYaml .Values.model.volume }}
{{- else }}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-models" (include "ascendra.fullname" .)) .Values.model.claim.existing }}
{{- end }}
{{- end -}}

{{/* The image that has tools to fetch or make a model: that of the workers. */}}
{{- define "ascendra.prepareImage" -}}
{{ include "ascendra.image" (list . (ternary "worker-cuda" "worker-cpu" (eq .Values.workers.defaults.engine "cuda"))) }}
{{- end -}}

{{/* Holds a pod back until the model is complete. Call with (list $ IMAGE). */}}
{{- define "ascendra.waitForModel" -}}
{{- $root := index . 0 -}}
name: wait-for-model
image: {{ include "ascendra.image" . }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
command: [sh, -c, 'until test -e "$TARGET/config.json"; do sleep 2; done']
env:
  - {name: TARGET, value: {{ $root.Values.model.path | quote }}}
securityContext: {{- include "ascendra.containerSecurity" . | nindent 2 }}
resources:
  requests: {cpu: 10m, memory: 16Mi}
  limits: {memory: 64Mi}
volumeMounts:
  - {name: models, mountPath: /models, readOnly: true}
{{- end -}}

{{- define "ascendra.grace" -}}
{{- add .Values.settleSeconds .Values.drainTimeoutSeconds 15 -}}
{{- end -}}

{{/* The Secret with a component's certificate. Call with (list $ COMPONENT). */}}
{{- define "ascendra.tlsSecret" -}}
{{- $root := index . 0 -}}
{{- default (printf "%s-%s-tls" (include "ascendra.fullname" $root) (index . 1)) (index $root.Values.tls.secrets (index . 1)) -}}
{{- end -}}

{{/*
The certificates of a component as its configuration says it. Routers reach workers by address, so that all they ask of
a certificate is a name that those of workers and the predictor share. Call with (list $ COMPONENT).
*/}}
{{- define "ascendra.tlsConfig" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $name := include "ascendra.fullname" $root -}}
{{- $asks := dict "router" "internal" "worker" "predictor" "gateway" "router" -}}
{{- $admits := dict "worker" (list "router") "predictor" (list "router" "worker") -}}
{{- if $root.Values.tls.enabled -}}
tls:
  cert: /etc/ascendra-tls/tls.crt
  key: /etc/ascendra-tls/tls.key
  ca: /etc/ascendra-tls/ca.crt
  {{- with index $asks $component }}
  server-name: {{ $name }}-{{ . }}
  {{- end }}
  {{- with index $admits $component }}
  client-names:
    {{- range . }}
    - {{ $name }}-{{ . }}
    {{- end }}
  {{- end }}
{{- else if ne $component "gateway" -}}
# The network policy is what protects the port.
insecure: true
{{- end -}}
{{- end -}}

{{/* Asks a gRPC service for its health: Kubernetes' own probe speaks plaintext only. Call with (list $ PORT). */}}
{{- define "ascendra.grpcProbe" -}}
{{- if (index . 0).Values.tls.enabled -}}
httpGet: {path: /health, port: metrics}
{{- else -}}
grpc: {port: {{ index . 1 }}}
{{- end -}}
{{- end -}}
