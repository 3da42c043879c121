{{- define "echod.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The name of all resources. At most 50 characters, to leave room for suffixes. */}}
{{- define "echod.fullname" -}}
{{- $name := include "echod.name" . }}
{{- $whole := .Values.fullnameOverride | default (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) }}
{{- $whole | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* The labels that select this release's pods. They are immutable. */}}
{{- define "echod.selector" -}}
app.kubernetes.io/name: {{ include "echod.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: daemon
{{- end }}

{{- define "echod.labels" -}}
{{ include "echod.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "echod.image" -}}
{{- with .Values.image }}
{{- .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{/* The longest possible stop, rounded up, plus a margin. */}}
{{- define "echod.gracePeriod" -}}
{{- with .Values.config.shutdown }}
{{- add (ceil (addf .delay .drain_timeout .linger_timeout)) $.Values.terminationMargin }}
{{- end }}
{{- end }}

{{/* The settings of echod as TOML. */}}
{{- define "echod.toml" -}}
{{- $listeners := dict }}
{{- $ports := dict (toString (int .Values.admin.port)) "admin" }}
{{- $servicePorts := dict }}
{{- range $name, $listener := .Values.listeners }}
  {{- range $kind, $taken := dict "port" $ports "servicePort" $servicePorts }}
    {{- $number := toString (int (index $listener $kind)) }}
    {{- with get $taken $number }}{{ fail (printf "listeners.%s.%s: %s is already the port of %s" $name $kind $number .) }}{{ end }}
    {{- $_ := set $taken $number $name }}
  {{- end }}
  {{- $table := merge (dict "address" (printf ":%d" (int $listener.port))) (omit $listener "port" "servicePort" "tls" "udp" "refuse_ports") }}
  {{- with $listener.tls }}
    {{- $folder := printf "/etc/echod/tls/%s" $name }}
    {{- $tls := dict "certificate" (printf "%s/tls.crt" $folder) "private_key" (printf "%s/tls.key" $folder) }}
    {{- with .minimum_version }}{{ $_ := set $tls "minimum_version" . }}{{ end }}
    {{- if .clientCertificates }}{{ $_ := set $tls "client_ca" (printf "%s/ca.crt" $folder) }}{{ end }}
    {{- $_ := set $table "tls" $tls }}
  {{- end }}
  {{- $_ := set $listeners $name $table }}
  {{- if $listener.udp }}
    {{- $datagrams := merge (dict "address" (printf "udp::%d" (int $listener.port))) (pick $listener "allow" "refuse_ports") }}
    {{- $_ := set $listeners (printf "%s-udp" $name) $datagrams }}
  {{- end }}
{{- end }}
{{- merge (dict "listeners" $listeners) .Values.config | toToml }}
{{- end }}

{{- define "echod.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65534
runAsGroup: 65534
fsGroup: 65534
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "echod.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}
