# Completes script names, flags and choices after `python -m` and `torchrun ... -m`:
#
#   source scripts/completion.bash
#
# in the project's folder; in zsh run `autoload -U bashcompinit && bashcompinit` before. The first
# <TAB> after a script's name takes as long as its --help, which is then remembered.

_nanochat_module="" _nanochat_help=""

_nanochat() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD - 1]}" words="" i
    COMPREPLY=()
    if [ "$before" = -m ]; then
        words="$(ls scripts/[a-z]*.py 2>/dev/null | sed 's|/|.|; s|\.py$||')"
    else
        for ((i = 1; i < COMP_CWORD; i++)); do
            [ "${COMP_WORDS[i]}" = -m ] && break
        done
        case "${COMP_WORDS[i + 1]:-}" in scripts.*) ;; *) return ;; esac
        if [ "$_nanochat_module" != "${COMP_WORDS[i + 1]}" ]; then
            _nanochat_module="${COMP_WORDS[i + 1]}"
            # The lines that name flags: "--dtype {auto,float32}  What it is."
            _nanochat_help="$(COLUMNS=80 python -m "$_nanochat_module" --help 2>/dev/null |
                sed -nE 's/^[^ -]+ (-.*)/\1/p')"
        fi
        case "$word" in
            -*) words="$(grep -oE -e '(^|, )--?[a-z0-9-]+' <<<"$_nanochat_help" | tr -d ', ')" ;;
            *) words="$(grep -oE -e "$before \{[^}]*\}" <<<"$_nanochat_help" |
                sed 's/.*{//; s/}//' | tr , ' ')" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}

complete -o default -F _nanochat python python3 torchrun
